"""A board's connection on which both sides sign what they say: the agent speaks and hears plain messages through it.

Chunks of blobs pass as they are: blobs are named by their digests, and those stand in signed messages.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from fedprune.core.errors import FedpruneError, ProtocolError, StaleEpochError, StorageError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.envelope import Envelope
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.security.succession import Succession, follow
from fedprune.wire.complaints import Complaints
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Birth, Hello, Message, parse
from fedprune.wire.topics import Topics
from fedprune_device.network.uplink import Wire

_LOG = logging.getLogger("fedprune.device")

PATIENCE_S = 300.0
"""After so long without a word of its server a board says so; one that has nothing to do may hear none for a day."""

_AGAIN_S, _LONGEST_AGAIN_S = 10.0, 3600.0
"""The pause after a repeated birth, which doubles with each further one, and the longest pause.

Whoever may publish on the board's topics can send messages that lead to a birth."""


class SignedLink:
    """What a board says, signed by it; what it hears, only if its server said it, and once.

    Args:
        link: The connection.
        identity: The board's; it has joined.
        clock: Seconds that only grow.

    Raises:
        IdentityError: It hasn't joined.
        StorageError: What it has heard can't be read.
    """

    def __init__(self, link: Wire, identity: DeviceIdentity, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._identity = identity
        self._topics = Topics(identity.site)
        self._sealer = Sealer(identity.key, identity.epochs)
        self._opener = Opener(identity.server, identity.heard(), identity.hear)
        self._clock = clock
        self._birth: tuple[str, bytes] | None = None
        self._again_at, self._pause_s = 0.0, _AGAIN_S
        self._complaints = Complaints(_LOG, clock)
        self._silent_since: float | None = None

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; False if that isn't possible now.

        Raises:
            StorageError: A new epoch can't be written down; nothing was sent.
        """
        if self._topics.parse(topic).channel != "up":
            return self._link.publish(topic, payload, qos)
        if topic == self._topics.up(self._identity.device) and isinstance(birth := parse(payload), Birth):
            # The server may have restarted: only an epoch that is new to it is sure to count.
            self._sealer.renew(topic)
            self._birth = topic, payload
            self._identity.renewed.clear()
            payload = replace(
                birth, server_key=self._opener.key.id.hex(), authorities=self._identity.authorities()
            ).to_bytes()
            if self._silent_since is None:
                self._silent_since = self._clock()
        return self._link.publish(topic, self._sealer.seal(topic, payload), qos)

    def listen(self, topics: Collection[str]) -> None:
        """Listen to exactly these shared topics; what comes there are chunks alone, which pass as they are."""
        self._link.listen(topics)

    def sealed(self, will: tuple[str, bytes]) -> tuple[str, bytes]:
        """A will as the broker may be given it."""
        return will[0], self._sealer.seal(*will)

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self._link.unsent

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | ConnectionUp | ConnectionDown | None:
        """The next message or event; None, too, if what came doesn't count."""
        item = self._link.get(timeout)
        self._look()
        if self._birth is not None and self._identity.renewed.is_set():  # the server waits for that in a rotation
            self._publish_birth()
        if not isinstance(item, tuple):
            if isinstance(item, ConnectionDown):
                self._silent_since = None
            return item
        topic, payload = item
        try:
            if self._topics.parse(topic).channel != "down":
                return item
            self._follow(topic, payload)
            body = self._opener.open(topic, payload)
            self._silent_since = math.inf  # the server is there; what this board hears now, it hears as a member
            self._note(topic, parse(body))
            return topic, body
        except StaleEpochError as error:
            self._say_again()
            self._complaints.about(topic, error)
        except (ProtocolError, StorageError) as error:
            self._complaints.about(topic, error)
        return None

    def _follow(self, topic: str, payload: bytes) -> None:
        """Learn a hello's key if the known key leads to it; ask for such a hello where another key signed a message."""
        envelope = Envelope.parse(payload)
        known = self._opener.key
        if envelope.key_id == known.id:
            return
        message = parse(envelope.body)
        if isinstance(message, Hello) and message.successions:
            successions = [Succession.from_hex(text) for text in message.successions]
            key = follow(self._identity.site, known, successions)
            if key.id == envelope.key_id:
                envelope.verify(key, topic)
                self._identity.succeed(key, successions)
                self._opener = Opener(key, self._identity.heard(), self._identity.hear)
                _LOG.info("the server's signing key was replaced: %s follows %s", key.fingerprint, known.fingerprint)
                return
        self._say_again()

    def _look(self) -> None:
        """Say, once a connection, that a server doesn't answer: to a board that was shut out nobody says so."""
        if self._silent_since is not None and self._clock() - self._silent_since >= PATIENCE_S:
            self._silent_since = math.inf
            _LOG.info(
                "nothing heard of the server since this board connected: it may be off, or wait for others. Where "
                "`fedprune-server devices` says that this board is revoked, let it join anew: fedprune-device join "
                "--new-key --claim FILE, with the same --broker and --state"
            )

    def _note(self, topic: str, message: Message) -> None:
        if isinstance(message, Hello) and topic == self._topics.down(self._identity.device):
            # Said to this board alone: what it says now must count, even if a copy of its disk was heard meanwhile.
            self._sealer.leap()
        if isinstance(message, Hello) and message.successions:
            self._identity.keep_successions(message.successions)  # a board may have joined under the latest key
        if isinstance(message, Hello) and message.authorities:
            try:
                self._identity.follow_authorities(message.authorities)
            except FedpruneError as error:  # it is said again
                _LOG.warning("%s", error)
        if isinstance(message, Hello) and message.time is not None:
            try:
                self._identity.times.learn(message.time)
            except FedpruneError as error:  # it is said again
                _LOG.warning("%s", error)

    def _say_again(self) -> None:
        """The server doesn't know that this board has restarted, or somebody repeats what it said before."""
        now = self._clock()
        if self._birth is None or now < self._again_at:
            return
        if now >= self._again_at + _LONGEST_AGAIN_S:  # it was quiet
            self._pause_s = _AGAIN_S
        self._again_at, self._pause_s = now + self._pause_s, min(_LONGEST_AGAIN_S, 2 * self._pause_s)
        self._publish_birth()

    def _publish_birth(self) -> None:
        try:
            if self._birth is not None:
                self.publish(*self._birth)
        except StorageError as error:
            _LOG.warning("%s", error)
