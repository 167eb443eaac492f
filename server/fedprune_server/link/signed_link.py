"""The server's connection on which both sides sign what they say: the daemon speaks and hears plain messages by it.

Who may take part is looked up in the identity's database, which `fedprune-server devices` changes while the server
runs: from the next second on a device that is revoked is neither heard nor spoken to. Requests to join are answered
here, so many a second.

Chunks of blobs pass as they are: blobs are named by their digests, and those stand in signed messages.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from fedprune.errors import ProtocolError, SignatureError, StaleEpochError, TwoSignersError
from fedprune.trust.correspondence import Opener, Sealer
from fedprune.trust.envelope import unseal
from fedprune.trust.keys import VerifyingKey
from fedprune.wire.complaints import Complaints
from fedprune.wire.connection_news import ConnectionUp
from fedprune.wire.messages import Birth, Death, Hello, parse
from fedprune.wire.topics import EVERYONE, JOIN, NO_JOB, Topics
from fedprune_server.fleet.quarantine import Quarantine
from fedprune_server.identity.folder import IdentityFolder
from fedprune_server.identity.join_desk import JoinDesk
from fedprune_server.link.intake import TURN_S
from fedprune_server.link.wire import Doubled, Item, Relay, ShutOut, Unheard, Wire

log = logging.getLogger("fedprune.server")

_LOOK_S = 1.0
"""At most so often the database is asked whether somebody was let in or shut out."""

_AGAIN_S = 10.0
"""At most so often a device is told that this server has restarted."""

_ASKED = 3
"""Hellos to a device whose answers are waited for: not all are heard."""

_READ_AHEAD = 256
"""Messages that are opened together."""

JOINS_PER_S = 20.0
"""Requests to join that are looked at: each costs a signature, and anybody may ask. Who is not heard asks again."""


class Joins(Protocol):
    """A connection for requests to join.

    Attributes:
        dropped: Messages that didn't fit into its inbox.
        overflowed: The topic, as far as the client in it, that had most waiting when one didn't fit.
    """

    dropped: int
    overflowed: str

    def get(self, timeout: float | None = 0.0) -> object:
        """The next message (topic, payload) or event; None if nothing waits."""
        ...


class SignedLink(Relay):
    """What a server says, signed by it; what devices say that are let in, each message once.

    Args:
        link: The connection; it listens to the server's topics.
        identity: The server's.
        clock: Seconds of a monotonic clock.
        joins: A connection that listens to `JoinDesk.subscription`, so that strangers crowd nobody but each other;
            by default `link` listens to that, too.
        quarantine: Is told who is a member.
    """

    def __init__(
        self,
        link: Wire,
        identity: IdentityFolder,
        clock: Callable[[], float] = time.monotonic,
        *,
        joins: Joins | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(link)
        self._joining = joins
        self._quarantine = quarantine or Quarantine(clock)
        self._dropped = 0
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
        self._complaints = Complaints(log, clock)
        self._news: deque[ShutOut | Doubled] = deque()
        self._asked: dict[str, int] = {}
        self._births: dict[str, int] = {}
        self._joins, self._joins_at = JOINS_PER_S, clock()
        self._begun: dict[tuple[str, str], int] = {}  # latest epochs by key and stream, not yet on the disk
        self._opened: deque[tuple[str, Item]] = deque()  # by device, empty for what is of none

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; False if that isn't possible, or it is for a device that isn't let in.

        Raises:
            StorageError: A new epoch can't be written down; nothing was sent.
        """
        address = self._topics.parse(topic)
        if address.device != EVERYONE and address.device not in self._look():
            return False
        if address.channel == "down":
            if address.device != EVERYONE and isinstance(parse(payload), Hello):
                self._asked[address.device] = min(_ASKED, self._asked.get(address.device, 0) + 1)
            payload = self._sealer.seal(topic, payload)
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> Item | Unheard | None:
        """The next message or event; None if nothing waits.

        Raises:
            StorageError: The disk fails or is full.
        """
        self._look()
        if self._news:
            return self._news.popleft()
        if self._joining is not None:
            self._hear_joins(self._joining)
        if not self._opened:
            item = self._link.get(timeout)
            if item is None:
                return None
            self._read(item)
        while self._opened:
            device, opened = self._opened.popleft()
            if not device or device in self._members:  # of now: a board may have been let in while this waited
                return opened
        return Unheard()

    def _read(self, item: Item | Unheard | None) -> None:
        """Open all that waits, for a turn's time at most, and write the epochs that begin with it down at once.

        Boards that all come back at once don't have the server wait for the disk once for each of them.
        """
        until = self._clock() + TURN_S
        while item is not None:
            if not isinstance(item, Unheard):
                self._take(item)
            item = self._link.get() if self._clock() < until and len(self._opened) < _READ_AHEAD else None
        if self._begun:
            self._store.hear([(key, stream, epoch) for (key, stream), epoch in self._begun.items()])
            self._begun.clear()

    def _take(self, item: Item) -> None:
        if isinstance(item, ConnectionUp):
            # Devices may have restarted: only an epoch that is new to them is sure to count.
            self._sealer.renew(self._topics.broadcast())
        if not isinstance(item, tuple):
            self._opened.append(("", item))
            return
        topic, payload = item
        try:
            if topic.endswith(f"/{NO_JOB}/{JOIN}"):
                self._join(topic, payload)
                return
            device, _, channel = self._topics.parse(topic)
            if device not in self._look():
                hint = (
                    f"`fedprune-server devices` lists who is; `fedprune-server claim --device {device}` lets it in. "
                    "If it was shut out, let it join anew: `fedprune-device join --new-key --claim FILE` on the board."
                )
                raise SignatureError(f"{device} is not let in", hint=hint)
            self._opened.append((device, item if channel != "up" else (topic, self._open(device, topic, payload))))
        except ProtocolError as error:
            self._complaints.about(topic, error)

    def _hear_joins(self, joins: Joins) -> None:
        """Answer the next request to join, if it is time for one; report who sends too many."""
        if joins.dropped != self._dropped:
            self._dropped = joins.dropped
            self._quarantine.crowded(joins.overflowed.rpartition("/")[2])
            while joins.get() is not None:
                pass  # whoever is in earnest asks again, and would wait behind all that
        self._refill_joins()
        if self._joins < 1:
            return
        item = joins.get()
        if isinstance(item, tuple):
            try:
                self._join(*item)
            except ProtocolError as error:
                self._complaints.about(item[0], error)

    def _refill_joins(self) -> None:
        now = self._clock()
        self._joins = min(JOINS_PER_S, self._joins + (now - self._joins_at) * JOINS_PER_S)
        self._joins_at = now

    def _join(self, topic: str, payload: bytes) -> None:
        self._refill_joins()
        if self._joins >= 1:
            self._joins -= 1
            self._link.publish(*self._desk.receive(topic, payload))
            self._look_at, self._version = self._clock(), None  # who was just let in may speak at once

    def _open(self, device: str, topic: str, payload: bytes) -> bytes:
        opener = self._opener(device)
        before = opener.epoch(topic)
        try:
            body = opener.open(topic, payload)
        except StaleEpochError as error:
            # A will was signed when its connection began. It can't be repeated to any effect: it has the
            # connection's number, and only the latest connection's counts.
            body = unseal(opener.key, topic, payload).body
            if not isinstance(parse(body), Death):
                if isinstance(error, TwoSignersError):
                    self._news.append(Doubled(device))
                self._say_again(device)
                raise
            return body
        if topic == self._topics.up(device) and isinstance(birth := parse(body), Birth):
            self._sealer.renew(self._topics.down(device))
            self._compare(device, birth.session, opener.epoch(topic) - before)
        return body

    def _compare(self, device: str, session: int, step: int) -> None:
        """See whether a birth can be of the board that was born last.

        A board's epochs follow each other, but when its process starts, which begins another session, and when it is
        told a hello. A copy of its disk begins elsewhere. Whoever starts is therefore asked again, and so is then the
        other; who answers unasked, or in an epoch that is over, is another one.
        """
        known = self._births.get(device)
        self._births[device] = session
        if step == 1 or known is None:
            return
        if self._asked.get(device, 0):
            self._asked[device] -= 1
        elif session == known:
            self._news.append(Doubled(device))
        else:
            self._say_again(device)

    def _look(self) -> dict[str, str]:
        """The keys of who is let in, by name; who is no more, or has another key, will be said to be shut out."""
        now = self._clock()
        if self._version is None or now >= self._look_at:
            self._look_at = now + _LOOK_S
            version = self._store.version()
            if version != self._version:
                before, self._version, self._members = self._members, version, self._store.members()
                self._quarantine.know(self._members)
                self._news.extend(ShutOut(n) for n, key in before.items() if self._members.get(n) != key)
        return self._members

    def _opener(self, device: str) -> Opener:
        """What reads a member's messages."""
        key, opener = self._members[device], self._openers.get(device)
        if opener is None or opener.key.hex != key:
            opener = Opener(VerifyingKey.from_hex(key), self._store.heard(key), partial(self._begins, key))
            self._openers[device] = opener
        return opener

    def _begins(self, key: str, stream: str, epoch: int) -> None:
        self._begun[key, stream] = epoch

    def _say_again(self, device: str) -> None:
        """A device doesn't know that this server has restarted, or somebody repeats what it said before."""
        now = self._clock()
        if now >= self._told.get(device, now):
            self._told[device] = now + _AGAIN_S
            self.publish(self._topics.down(device), Hello(self._time()).to_bytes())
