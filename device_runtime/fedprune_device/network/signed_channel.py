"""Signed messages in both directions. Chunks need no signature, because signed messages name their digests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cached_property

from fedprune.core.errors import FedpruneError, StaleEpochError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.wire.messages import Birth, Hello, Message, parse
from fedprune_device.network.connection import Channel

_LOG = logging.getLogger("fedprune.device")

# The pause after a repeated birth, which doubles with each further one, and the longest pause. Without pauses, anyone
# who may publish on the board's topics could make it send births for ever.
_AGAIN_S, _LONGEST_AGAIN_S = 10.0, 3600.0


class SignedChannel(Channel):
    """Signs what the board sends, and accepts each message that its server has signed once. The board has joined."""

    def __init__(self, identity: DeviceIdentity, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(identity.device, identity.site)
        self._identity = identity
        self._sealer = Sealer(identity.key, identity.epochs)
        self._opener = Opener(identity.server, identity.heard(), identity.hear)
        self._clock = clock
        self._born = self._disbelieved = False
        self._again_at, self._pause_s = 0.0, _AGAIN_S

    @cached_property
    def signing_key(self) -> SigningKey:
        return self._identity.key

    @property
    def birth_due(self) -> bool:
        """Whether the server has restarted or doubts this board."""
        return self._born and self._disbelieved

    def seal(self, topic: str, message: Message) -> bytes:
        """A signed payload; a birth begins a new epoch. Raises `StorageError` if that can't be written."""
        if isinstance(message, Birth):
            self._disbelieved = False
            # The server may have restarted: only an epoch that is new to it is sure to count.
            self._sealer.renew(topic)
            self._born = True
        return self._sealer.seal(topic, message.to_bytes())

    def open(self, topic: str, payload: bytes) -> Message:
        """The message in a payload that the server signed, the first time it arrives; else `ProtocolError`."""
        try:
            body = self._opener.open(topic, payload)
        except StaleEpochError:
            self._doubt()
            raise
        message = parse(body)
        if isinstance(message, Hello):
            self._learn(topic, message)
        return message

    @property
    def refusal(self) -> str:
        return (
            "this board was revoked (`fedprune-server devices` says so; then let it join again: fedprune-device join "
            "--new-key --claim FILE, with the same --broker and --state), "
        )

    def _learn(self, topic: str, hello: Hello) -> None:
        if topic == self.topics.down(self.device):
            # A hello to this board alone asks for its next messages, which must count even if the server has heard a
            # copy of its disk meanwhile.
            self._sealer.leap()
        if (seconds := hello.time) is not None:
            try:
                self._identity.times.learn(seconds)
            except FedpruneError as error:  # the server repeats it
                _LOG.warning("%s", error)

    def _doubt(self) -> None:
        """Note, at most once per pause, that the server may not know of this board's restart, or of its own."""
        now = self._clock()
        if not self._born or now < self._again_at:
            return
        if now >= self._again_at + _LONGEST_AGAIN_S:  # after a long quiet time the pauses begin anew
            self._pause_s = _AGAIN_S
        self._again_at, self._pause_s = now + self._pause_s, min(_LONGEST_AGAIN_S, 2 * self._pause_s)
        self._disbelieved = True
