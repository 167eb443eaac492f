"""The server's connection with signatures: the server's loop sends and receives plain messages over it.

The members are read from the database, which `fedprune-server devices` changes while the server runs: a revoked device
is cut off within a second. Requests to join are answered here, at a limited rate. Chunks of blobs pass unsigned: blobs
are named by their digests, which signed messages carry.

An *epoch* counts the starts of a signer, so that old messages are refused. A server that has started greets the devices
(*hello*); a device that connects announces itself (*birth*).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

from fedprune.core.errors import ProtocolError, SignatureError, StaleEpochError, TwoSignersError
from fedprune.security.keys import VerifyingKey
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.security.signed_envelope import unseal
from fedprune.wire.fleet_messages import APPROVED
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import Birth, Death, Hello, parse_message
from fedprune.wire.queues import ConnectionUp
from fedprune.wire.rejected_messages import RejectedMessageLog
from fedprune.wire.topics import EVERYONE, JOIN, NO_JOB, Topics
from fedprune_server.devices.quarantine import STRANGERS, Quarantine
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.messaging import transport

log = logging.getLogger("fedprune.server")

# Minimum seconds between two queries for changed members.
_MEMBER_POLL_INTERVAL_S = 1.0

# Minimum seconds between two hellos to one device that seems not to know of this server's restart.
_HELLO_INTERVAL_S = 10.0

# Maximum number of hellos to a device whose answers are awaited: answers may be lost, and must not be counted for ever.
_MAX_UNANSWERED_HELLOS = 3

# Maximum number of new members that are greeted at once. Of more, those that are connected already are heard with
# their next `alive`, minutes later.
_MAX_GREETED = 100

# Maximum number of messages that are opened together.
_MAX_OPENED = 256

# Maximum number of answered requests to join: each costs a signature, and strangers may send them. Boards repeat them.
JOINS_PER_S = 20.0


class AuthenticatedLink(transport.Relay):
    """A connection that signs the server's messages and passes on each signed message of a member once.

    Args:
        joins: A connection subscribed to `Topics.join_subscription`, so that a flood of join requests delays no
            member; by default `link` has that subscription, too.
        quarantine: Is given the members, each of which has an allowance.
    """

    def __init__(
        self,
        link: transport.Wire,
        identity: IdentityFolder,
        clock: Callable[[], float] = time.monotonic,
        *,
        joins: BrokerLink | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(link)
        self._join_link = joins
        self._quarantine = quarantine or Quarantine(clock)
        self._dropped_joins, self._flooder = 0, ""
        self._identity, self._store = identity, identity.store
        self._wall_clock = identity.authority.now
        self._topics = Topics(identity.site)
        self._enrollment = EnrollmentService(identity)
        self._sealer = Sealer(identity.key, identity.epochs)
        self._openers: dict[str, Opener] = {}  # by key, as a key may have two names
        self._stored_epochs = identity.store.latest_epochs()  # stored epochs of keys without an opener yet
        self._members: Mapping[str, str] = {}
        self._members_version: str | None = None
        self._next_poll_at = 0.0
        self._next_hello_at: dict[str, float] = {}
        self._clock = clock
        self._complaints = RejectedMessageLog(log, clock)
        self._events: deque[transport.DeviceRevoked | transport.DuplicateIdentity] = deque()
        self._unanswered_hellos: dict[str, int] = {}
        self._birth_sessions: dict[str, int] = {}
        self._join_allowance, self._allowance_refilled_at = JOINS_PER_S, clock()
        self._unsaved_epochs: dict[tuple[str, str], int] = {}  # latest epochs by key and stream, not yet stored
        self._opened_items: deque[tuple[str, transport.Item]] = deque()  # by device, empty for events

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Send without waiting; False if that isn't possible, or if the addressed device is no member. Raises
        `StorageError` if a new epoch can't be stored; nothing was sent."""
        address = self._topics.parse(topic)
        if address.device != EVERYONE and address.device not in self._poll_members():
            return False
        if address.channel == "down":
            is_hello = Hello.kind.encode() in payload and isinstance(parse_message(payload), Hello)
            if is_hello and address.device != EVERYONE:
                count = self._unanswered_hellos.get(address.device, 0) + 1
                self._unanswered_hellos[address.device] = min(_MAX_UNANSWERED_HELLOS, count)
            payload = self._sealer.seal(topic, payload)
        return self._link.publish(topic, payload, qos)

    def get(self, timeout: float | None = 0.0) -> transport.Item | transport.DroppedMessage | None:
        """The next message or event; None if nothing waits. Raises `StorageError` if the disk fails or is full."""
        self._poll_members()
        if self._events:
            return self._events.popleft()
        if self._join_link is not None and self._answer_join(self._join_link):
            timeout = 0.0  # another request may wait
        if not self._opened_items:
            item = self._link.get(timeout)
            if item is None:
                return None
            self._open_waiting(item)
        while self._opened_items:
            device, opened = self._opened_items.popleft()
            if not device or device in self._members:  # as of now: it may have changed since
                return opened
        return transport.DroppedMessage()

    def _open_waiting(self, item: transport.Item | transport.DroppedMessage | None) -> None:
        """Open the waiting messages, for a turn's time at most.

        The epochs that they begin are stored no later than what they lead to: in the first job's transaction, before
        those of further jobs. After a crash before it the server accepts the messages again: nothing has come of them.
        """
        turn_ends_at = self._clock() + transport.MAX_TURN_S
        while item is not None:
            if not isinstance(item, transport.DroppedMessage):
                self._take_item(item)
            item = self._link.get() if self._clock() < turn_ends_at and len(self._opened_items) < _MAX_OPENED else None
        if self._unsaved_epochs:
            self._store.defer_epochs([(key, stream, epoch) for (key, stream), epoch in self._unsaved_epochs.items()])
            self._unsaved_epochs.clear()

    def _take_item(self, item: transport.Item) -> None:
        """Authenticate a message, and queue its content; drop a message of a stranger with a logged reason."""
        if isinstance(item, ConnectionUp):
            # Devices may have restarted meanwhile: they accept a new epoch in any case.
            self._sealer.begin_epoch(self._topics.broadcast())
        if not isinstance(item, tuple):
            self._opened_items.append(("", item))
            return
        topic, payload = item
        device = ""
        try:
            if topic.endswith(f"/{NO_JOB}/{JOIN}"):
                self._join(topic, payload)
                return
            device, _, channel = self._topics.parse(topic)
            if device not in self._poll_members():
                hint = (
                    f"`fedprune-server devices` lists the members, and `fedprune-server claim --device {device}` makes "
                    "a claim for it. After a revocation it joins again with a new key: `fedprune-device join --new-key "
                    "--claim FILE` on the board."
                )
                raise SignatureError(f"{device} is not a member", hint=hint)
            body = payload if channel != "up" else self._open_message(device, topic, payload)
            if body is not None:
                self._opened_items.append((device, (topic, body)))
        except ProtocolError as error:
            self._complaints.note_rejection(topic, error, device if device in self._members else "")

    def _answer_join(self, joins: BrokerLink) -> bool:
        """Answer the next request to join, if the rate allows it; returns whether there was one.

        A client that has filled the inbox is reported, and all its waiting requests are dropped: others would wait
        behind them.
        """
        if joins.dropped_count != self._dropped_joins:
            self._dropped_joins, self._flooder = joins.dropped_count, joins.flooding_prefix
            self._quarantine.join_flood.note(joins.flooding_prefix.rpartition("/")[2])
        self._refill_joins()
        if self._join_allowance < 1:
            return False
        item = joins.get()
        while self._flooder and isinstance(item, tuple) and item[0].startswith(f"{self._flooder}/"):
            item = joins.get()
        if item is None:
            self._flooder = ""
        if isinstance(item, tuple):
            try:
                self._join(*item)
            except ProtocolError as error:
                self._complaints.note_rejection(item[0], error)
        return isinstance(item, tuple)

    def _refill_joins(self) -> None:
        now = self._clock()
        refill = (now - self._allowance_refilled_at) * JOINS_PER_S
        self._join_allowance = min(JOINS_PER_S, self._join_allowance + refill)
        self._allowance_refilled_at = now

    def _join(self, topic: str, payload: bytes) -> None:
        self._refill_joins()
        if self._join_allowance >= 1:
            self._join_allowance -= 1
            topic, answer = self._enrollment.receive(topic, payload)
            self._link.publish(topic, answer.to_bytes())
            if answer.status == APPROVED:
                self._next_poll_at, self._members_version = self._clock(), None  # the new member may send at once

    def _open_message(self, device: str, topic: str, payload: bytes) -> bytes | None:
        """The content of a signed message; None if its device has sent too much. Raises `ProtocolError` if it isn't the
        device's, or is replayed: then strangers are charged for it, as the device may not have sent it."""
        opener = self._opener(device)
        previous_epoch = opener.epoch(topic)
        try:
            body = opener.open(topic, payload)
        except ProtocolError as error:
            # A will, and what was under way as this server started, are of an earlier epoch and honest.
            is_stale = isinstance(error, StaleEpochError)
            if not (is_stale and self._quarantine.charge_message(STRANGERS, len(payload))):
                self._quarantine.note_forgery(device, len(payload))
            if not isinstance(error, StaleEpochError):
                raise
            # A will was signed when its connection began, so its epoch is old. A repeated will has no effect: it names
            # its connection, and only the will of the latest connection counts.
            body = unseal(opener.key, topic, payload).body
            if not isinstance(parse_message(body), Death):
                if isinstance(error, TwoSignersError):
                    self._events.append(transport.DuplicateIdentity(device))
                self._repeat_hello(device)
                raise
            return body
        if not self._quarantine.charge_message(device, len(payload)):
            return None
        may_be_birth = Birth.kind.encode() in body or b"\\" in body  # which may stand for any letter
        if may_be_birth and topic == self._topics.up(device) and isinstance(birth := parse_message(body), Birth):
            self._sealer.begin_epoch(self._topics.down(device))
            self._check_epoch_step(device, birth.session, opener.epoch(topic) - previous_epoch)
        return body

    def _check_epoch_step(self, device: str, session: int, epoch_step: int) -> None:
        """Detect the birth of a second board with the same key.

        A board's epochs follow each other, except when its process starts, which begins another session, and after a
        hello. A copy of its disk continues from another epoch. So a board that starts gets another hello, and the
        answers decide: a board that announces itself without a hello, or in an earlier epoch, is another one.
        """
        previous_session = self._birth_sessions.get(device)
        self._birth_sessions[device] = session
        if epoch_step == 1 or previous_session is None:
            return
        if self._unanswered_hellos.get(device, 0):
            self._unanswered_hellos[device] -= 1
        elif session == previous_session:
            self._events.append(transport.DuplicateIdentity(device))
        else:
            self._repeat_hello(device)

    def _poll_members(self) -> Mapping[str, str]:
        """The members' keys by name. A former member, or one with another key now, is reported as revoked."""
        now = self._clock()
        if self._members_version is None or now >= self._next_poll_at:
            self._next_poll_at = now + _MEMBER_POLL_INTERVAL_S
            version = self._store.version()
            if version != self._members_version:
                is_first_poll, previous_members = self._members_version is None, self._members
                self._members_version, self._members = version, self._store.members()
                self._identity.update_revocations()
                self._quarantine.members = self._members
                self._events.extend(
                    transport.DeviceRevoked(name)
                    for name, key in previous_members.items()
                    if self._members.get(name) != key
                )
                new_members = [] if is_first_poll else self._members.keys() - previous_members.keys()
                # Another server may have let them in, so that their births came before this one knew them as members.
                for device in sorted(new_members) if len(new_members) <= _MAX_GREETED else ():
                    self._repeat_hello(device)
        return self._members

    def _opener(self, device: str) -> Opener:
        key = self._members[device]
        opener = self._openers.get(key)
        if opener is None:
            opener = Opener(VerifyingKey.from_hex(key), self._stored_epochs.pop(key, {}), partial(self._on_epoch, key))
            self._openers[key] = opener
        return opener

    def _on_epoch(self, key: str, stream: str, epoch: int) -> None:
        self._unsaved_epochs[key, stream] = epoch

    def _repeat_hello(self, device: str) -> None:
        """Greet a device that seems not to know of this server's restart, or whose earlier messages are replayed."""
        now = self._clock()
        if now >= self._next_hello_at.get(device, now):
            self._next_hello_at[device] = now + _HELLO_INTERVAL_S
            self.publish(self._topics.down(device), Hello(self._wall_clock()).to_bytes())
