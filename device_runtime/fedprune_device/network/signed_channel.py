"""Signed messages in both directions. Chunks need no signature, because signed messages name their digests.

A birth is a board's announcement of itself after it has connected, a hello the server's greeting at its start. Both
begin a new epoch of their signer: messages of earlier epochs are refused, so that none can be replayed. A side that
receives a message of an old epoch asks for the other's birth or hello again (`fedprune.security.signed_channel`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cached_property

from fedprune.core.errors import FedpruneError, StaleEpochError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.wire.messages import Birth, Hello, Message, parse_message
from fedprune_device.network.connection import MessageChannel

_LOG = logging.getLogger("fedprune.device")

# The pause after a repeated birth, which doubles with each further one, and the longest pause. Without pauses, anyone
# who may publish on the board's topics could make it send births for ever.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 10.0, 3600.0


class SignedChannel(MessageChannel):
    """Signs what a board that has joined sends, and accepts each message that its server has signed, once."""

    def __init__(self, identity: DeviceIdentity, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(identity.device, identity.site)
        self._identity = identity
        self._sealer = Sealer(identity.key, identity.epochs)
        self._opener = Opener(identity.server, identity.server_epochs(), identity.store_server_epoch)
        self._clock = clock
        self._has_sent_birth = self._needs_birth = False
        self._next_birth_at, self._pause_s = 0.0, _FIRST_PAUSE_S

    @cached_property
    def signing_key(self) -> SigningKey:
        return self._identity.key

    @property
    def is_birth_due(self) -> bool:
        """Whether to send a birth again: a server's message was of an old epoch, so one of both has restarted."""
        return self._has_sent_birth and self._needs_birth

    def seal(self, topic: str, message: Message) -> bytes:
        """A signed payload; a birth begins a new epoch. Raises `StorageError` if that can't be written."""
        if isinstance(message, Birth):
            self._needs_birth = False
            # The server may have restarted: only an epoch that is new to it is sure to count.
            self._sealer.begin_epoch(topic)
            self._has_sent_birth = True
        return self._sealer.seal(topic, message.to_bytes())

    def open(self, topic: str, payload: bytes) -> Message:
        """The message in a payload that the server signed, the first time it arrives; otherwise `ProtocolError`."""
        try:
            body = self._opener.open(topic, payload)
        except StaleEpochError:
            self._note_stale_epoch()
            raise
        message = parse_message(body)
        if isinstance(message, Hello):
            self._on_hello(topic, message)
        return message

    def _on_hello(self, topic: str, hello: Hello) -> None:
        if topic == self.topics.down(self.device):
            # With a hello to this board only, the server asks for a new epoch. A block of epochs is skipped: a copy of
            # this board's disk may have used them, and the server rejects what is not later.
            self._sealer.skip_block()
        if (seconds := hello.time) is not None:
            try:
                self._identity.trusted_time.note_time(seconds)
            except FedpruneError as error:  # the server repeats it
                _LOG.warning("%s", error)

    def _note_stale_epoch(self) -> None:
        """Note, at most once per pause, that the server may not know of this board's restart, or of its own."""
        now = self._clock()
        if not self._has_sent_birth or now < self._next_birth_at:
            return
        if now >= self._next_birth_at + _MAX_PAUSE_S:  # after a long quiet time the pauses start short again
            self._pause_s = _FIRST_PAUSE_S
        self._next_birth_at, self._pause_s = now + self._pause_s, min(_MAX_PAUSE_S, 2 * self._pause_s)
        self._needs_birth = True
