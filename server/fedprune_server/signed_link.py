"""The server's connection on which both sides sign what they say: the daemon speaks and hears plain messages by it.

Who may take part is looked up in the identity's database, which `fedprune-server devices` changes while the server
runs: a device that is revoked is heard no more from the next second on. Requests to join are answered here.

Chunks of blobs pass as they are: blobs are named by their digests, and those stand in signed messages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from fedprune.errors import FedpruneError, ProtocolError, SignatureError, StaleEpochError
from fedprune.trust.correspondence import Opener, Sealer
from fedprune.trust.envelope import unseal
from fedprune.trust.keys import VerifyingKey
from fedprune.wire.fields import one_line
from fedprune.wire.link import ConnectionUp, Event
from fedprune.wire.messages import Birth, Death, Hello, parse
from fedprune.wire.topics import JOIN, NO_JOB, Topics
from fedprune_server.identity_folder import IdentityFolder
from fedprune_server.join_desk import JoinDesk
from fedprune_server.post import Wire

log = logging.getLogger("fedprune.server")

_LOOK_S = 1.0
"""At most so often the database is asked whether somebody was let in or shut out."""

_AGAIN_S = 10.0
"""At most so often a device is told that this server has restarted."""

_COMPLAINTS = 20
"""Bad messages that are logged one by one; later ones are dropped silently."""


class SignedLink:
    """What a server says, signed by it; what devices say that are let in, each message once.

    Args:
        link: The connection; it listens to the server's topics and to `JoinDesk.subscription`.
        identity: The server's.
        clock: Seconds that only grow.
    """

    def __init__(self, link: Wire, identity: IdentityFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._store = identity.store
        self._time = identity.authority.now
        self._topics = Topics(identity.site)
        self._desk = JoinDesk(identity)
        self._sealer = Sealer(identity.key, identity.epochs)
        self._openers: dict[str, Opener] = {}
        self._members: dict[str, str] = {}
        self._version: int | None = None
        self._look_at = 0.0
        self._told: dict[str, float] = {}
        self._clock = clock
        self._complaints = 0

    @property
    def connected(self) -> bool:
        """Whether the connection is up."""
        return self._link.connected

    @property
    def unsent(self) -> int:
        """Payload bytes that wait to be sent."""
        return self._link.unsent

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is sent."""
        return self._link.flush(timeout)

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting.

        Raises:
            StorageError: A new epoch can't be written down; nothing was sent.
        """
        if self._topics.parse(topic).channel == "down":
            payload = self._sealer.seal(topic, payload)
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | Event | None:
        """The next message or event; None, too, if what came doesn't count or was answered here.

        Raises:
            StorageError: The disk fails or is full.
        """
        item = self._link.get(timeout)
        if isinstance(item, ConnectionUp):
            # Devices may have restarted: only an epoch that is new to them is sure to count.
            self._sealer.renew(self._topics.broadcast())
        if not isinstance(item, tuple):
            return item
        topic, payload = item
        try:
            if topic.endswith(f"/{NO_JOB}/{JOIN}"):
                self._link.publish(*self._desk.receive(topic, payload))
                self._version = None
                return None
            device, _, channel = self._topics.parse(topic)
            if channel != "up":
                return item
            return topic, self._open(device, topic, payload)
        except ProtocolError as error:
            self._complain(topic, error)
            return None

    def _open(self, device: str, topic: str, payload: bytes) -> bytes:
        opener = self._opener(device)
        if opener is None:
            raise SignatureError(
                f"{device} is not let in",
                hint=f"`fedprune-server devices` lists who is; `fedprune-server claim --device {device}` lets it join.",
            )
        try:
            body = opener.open(topic, payload)
        except StaleEpochError:
            # A will was signed when its connection began. It can't be repeated to any effect: it has the
            # connection's number, and only the latest connection's counts.
            body = unseal(opener.key, topic, payload).body
            if not isinstance(parse(body), Death):
                self._say_again(device)
                raise
            return body
        if topic == self._topics.up(device) and isinstance(parse(body), Birth):
            self._sealer.renew(self._topics.down(device))
        return body

    def _opener(self, device: str) -> Opener | None:
        """What reads a device's messages; None if it is not let in."""
        now = self._clock()
        if self._version is None or now >= self._look_at:
            self._look_at = now + _LOOK_S
            version = self._store.version()
            if version != self._version:
                self._version, self._members = version, self._store.members()
        key = self._members.get(device)
        opener = self._openers.get(device)
        if key is None:
            self._openers.pop(device, None)
            return None
        if opener is None or opener.key.hex != key:
            opener = Opener(VerifyingKey.from_hex(key), self._store.heard(key), partial(self._store.hear, key))
            self._openers[device] = opener
        return opener

    def _say_again(self, device: str) -> None:
        """A device doesn't know that this server has restarted, or somebody repeats what it said before."""
        now = self._clock()
        if now >= self._told.get(device, now):
            self._told[device] = now + _AGAIN_S
            self.publish(self._topics.down(device), Hello(self._time()).to_bytes())

    def _complain(self, topic: str, error: FedpruneError) -> None:
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            log.warning("ignored a message on %s: %s", one_line(topic, 200), one_line(str(error)))
        if self._complaints == _COMPLAINTS:
            log.warning("further bad messages are ignored silently")
