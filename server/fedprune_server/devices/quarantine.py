"""Quarantine of devices that flood the server or send unusable updates, so that other devices are not affected.

Every device has an allowance of points, which is refilled with time and with the server's messages that need an answer.
Each message costs points, by its size and by the work it causes. Requested chunks, and requests for blobs that the
device was offered, are free, up to a few times what the blob needs. So a board that delivers updates, fetches models,
or reconnects together with ten thousand others spends few points, whatever its speed, while a flood can't earn its own
points back. A device without points, or one that sends malformed updates, is quarantined: its messages are
dropped unread, for a minute at first and twice as long each time.

The accounting takes the same few steps for every message and keeps records of members only. Strangers share one
allowance: unknown names, because a stranger can choose any number of them, and messages in a member's name that the
member has not signed. Nothing unsigned is charged to a member whose key is known.
"""

from __future__ import annotations

import heapq
import json
import logging
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.messages import MAX_REQUEST
from fedprune_server.devices.join_flood import JoinFlood

log = logging.getLogger("fedprune.server")

# File of the state folder, which `fedprune-server status` reads.
QUARANTINE_FILE = "quarantine.json"

# Maximum number of a device's points, and the points that it regains in a second.
MAX_POINTS, POINTS_PER_S = 4000.0, 20.0

# Cost of a message, and the bytes of it that cost another point.
MESSAGE_COST, BYTES_PER_POINT = 1.0, 4096

# Additional cost of a birth: it makes the server plan, and write to its disk.
BIRTH_COST = 30.0

# Cost of an invalid message, or one in another device's name. Messages of unknown types and versions cost nothing: a
# board with newer software sends them in good faith.
INVALID_MESSAGE_COST = 50.0

# Points that a device gets for each message of the server that needs an answer.
POINTS_PER_ANSWER = 2.0

# Free requests for an offered blob: a fixed number, and a number for each of its leaves.
FREE_REQUESTS, FREE_REQUESTS_PER_LEAF = 64, 4

# Points given back for a free request: the cost of its message, with its bytes.
_REQUEST_COST = MESSAGE_COST + 0.25
# Blobs whose requests are counted per device, the latest ones, which bounds the memory.
_MAX_REQUESTED_BLOBS = 256

# Maximum bytes of chunks that a device may send without cost. A requested leaf adds twice its size, because it may come
# twice.
MAX_CHUNK_CREDIT = 4 * MAX_REQUEST * LEAF_BYTES

# Malformed updates in a row that lead to quarantine.
MAX_STRIKES = 3

# Seconds of a device's first quarantine, and of its longest: each one is twice as long as the last.
FIRST_QUARANTINE_S, MAX_QUARANTINE_S = 60.0, 3600.0

# Seconds without a quarantine after which the next one lasts `FIRST_QUARANTINE_S` again.
FORGIVEN_AFTER_S = 24 * 3600.0

# Maximum points that all strangers have together, and that they regain in a second.
MAX_STRANGER_POINTS, STRANGER_POINTS_PER_S = 100_000.0, 1000.0

# Seconds after a forged message for which strangers pay for what comes in its device's name before it is read. So a
# flood costs no more signature checks than strangers have points.
FORGERY_S = 60.0

# The strangers' row among those of devices; no device has this name.
STRANGERS = ""

_SAVE_INTERVAL_S, _WARNING_INTERVAL_S = 10.0, 600.0


@dataclass(frozen=True)
class Quarantined:
    """A device was quarantined, so that its part in the round no longer counts."""

    device: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Released:
    """A device's quarantine has ended. The device may have been connected all along."""

    device: str


@dataclass(slots=True)
class UnusedMessages:
    """Counts of a device's unused messages since the server's start."""

    dropped: int = 0
    bad: int = 0
    unasked: int = 0
    refused: int = 0
    times: int = 0


@dataclass(slots=True)
class _Ledger:
    """The account of a device: its points, its free requests and chunks, and its quarantines."""

    points: float = MAX_POINTS
    refilled_at: float = 0.0
    credit: int = 0
    fetching: dict[str, int] = field(default_factory=dict)
    strikes: int = 0
    past_quarantines: int = 0
    quarantined_until: float = 0.0
    forged_until: float = 0.0
    reason: str = ""
    counts: UnusedMessages = field(default_factory=UnusedMessages)


class Quarantine:
    """Message allowances of all devices, and their quarantine, stored in `path` for `fedprune-server status`."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        path: Path | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall, self._path = clock, wall, path
        self._known = set[str]()
        # The fleet's members, each with an allowance like the devices that have announced themselves.
        self.members: Container[str] = ()
        # Made when a device is first heard: most of a large fleet's members are away.
        self._ledgers: dict[str, _Ledger] = {}
        self._strangers = _Ledger(MAX_STRANGER_POINTS, clock())
        self.join_flood = JoinFlood(clock)
        self._events: list[Quarantined | Released] = []
        self._quarantine_ends: list[tuple[float, str]] = []
        self._has_changed = path is not None and path.exists()
        self._next_save_at = self._next_warning_at = clock()

    def add_known(self, devices: Iterable[str]) -> None:
        """Give devices an allowance each. The caller limits their number."""
        self._known.update(devices)

    def charge_message(self, device: str, size: int, *, chunk: bool = False, is_verified: bool = True) -> bool:
        """Charge a device for a message, or for a chunk of a blob; returns whether the server may read it. One that
        isn't `is_verified` is only in the device's name: a chunk, or a message whose signature isn't checked yet."""
        ledger, now = self._ledger(device), self._clock()
        if ledger is None:
            return self._charge_strangers(size, now)
        if now < ledger.quarantined_until:
            ledger.counts.dropped += 1
            self._has_changed = True
            return False
        if chunk:
            requested = min(ledger.credit, size)
            ledger.credit -= requested
            if requested == size:
                return True
            ledger.counts.unasked += is_verified
            size -= requested
        if not is_verified:
            return (not chunk and now >= ledger.forged_until) or self._charge_strangers(size, now)
        cost = MESSAGE_COST + size / BYTES_PER_POINT
        is_paid = self._charge(
            device, ledger, cost, now, "chunks that the server didn't ask for" if chunk else "too many messages"
        )
        ledger.counts.dropped += not is_paid
        return is_paid

    def note_forgery(self, device: str, size: int) -> None:
        """Charge strangers for a message in a member's name that isn't genuine, or that has come before."""
        ledger, now = self._ledger(device), self._clock()
        self._strangers.counts.bad += 1
        self._has_changed = True
        if ledger is not None:
            if now >= ledger.forged_until:  # else they have paid before it was read
                self._charge_strangers(size, now)
            ledger.forged_until = now + FORGERY_S

    def should_ignore(self, topic: str) -> bool:
        """Whether messages of a topic are dropped unread; may be called from any thread."""
        levels = topic.split("/", 4)
        ledger = self._ledgers.get(levels[3]) if len(levels) > 3 else None
        if ledger is None or self._clock() >= ledger.quarantined_until:
            return False
        ledger.counts.dropped += 1
        self._has_changed = True
        return True

    def credit_message(self, device: str) -> None:
        """Credit a device for a message that needs an answer."""
        if (ledger := self._ledger(device)) is not None:
            self._refill(ledger, self._clock())
            ledger.points = min(MAX_POINTS, ledger.points + POINTS_PER_ANSWER)

    def charge_request(self, device: str, sha256: str, leaves: int) -> None:
        """Charge a request for a part of a blob with this number of leaves. A few requests of it all are free."""
        if (ledger := self._ledger(device)) is None:
            return
        used_requests = ledger.fetching.pop(sha256, 0)
        # A blob that is still coming has no leaves yet.
        is_free = used_requests < FREE_REQUESTS + FREE_REQUESTS_PER_LEAF * leaves
        if is_free:
            self._refill(ledger, self._clock())
            ledger.points = min(MAX_POINTS, ledger.points + _REQUEST_COST)
        ledger.fetching[sha256] = used_requests + is_free
        if len(ledger.fetching) > _MAX_REQUESTED_BLOBS:
            del ledger.fetching[next(iter(ledger.fetching))]

    def credit_leaves(self, device: str, leaves: int) -> None:
        """Credit a device for requested leaves, each of which may come twice."""
        if (ledger := self._ledger(device)) is not None:
            ledger.credit = min(MAX_CHUNK_CREDIT, ledger.credit + 2 * leaves * (LEAF_BYTES + 64))

    def charge_birth(self, device: str) -> None:
        """Charge an announcement."""
        if device not in self.members:
            self.add_known([device])
        if (ledger := self._ledger(device)) is not None:
            self._charge(device, ledger, BIRTH_COST, self._clock(), "it announces itself again and again")

    def charge_invalid(self, device: str) -> None:
        """Charge an invalid message."""
        if (ledger := self._ledger(device)) is not None:
            ledger.counts.bad += 1
            self._charge(device, ledger, INVALID_MESSAGE_COST, self._clock(), "messages that make no sense")
        else:
            self._strangers.counts.bad += 1
            self._charge_strangers(int(INVALID_MESSAGE_COST * BYTES_PER_POINT), self._clock())

    def note_rejected_update(self, device: str, kind: str, reason: str) -> None:
        """Note that a device's update was rejected. Only `FailureKind.MALFORMED` counts.

        Other kinds happen to honest devices: diverged training makes weights that are far too large, and a device may
        no longer have its update.
        """
        ledger = self._ledger(device)
        if ledger is None or kind != FailureKind.MALFORMED:
            return
        ledger.counts.refused += 1
        ledger.strikes += 1
        self._has_changed = True
        if ledger.strikes >= MAX_STRIKES and self._clock() >= ledger.quarantined_until:
            self._sentence(device, ledger, f"{MAX_STRIKES} malformed updates in a row, the last one: {reason[:200]}")

    def note_counted_update(self, device: str) -> None:
        """Note that a device's update was aggregated, which ends a row of malformed ones."""
        if (ledger := self._ledger(device)) is not None:
            ledger.strikes = 0

    def next_event(self) -> Quarantined | Released | None:
        """The next device whose quarantine has begun or ended; None if there is none."""
        now = self._clock()
        while self._quarantine_ends and self._quarantine_ends[0][0] <= now:
            _, device = heapq.heappop(self._quarantine_ends)
            log.info("the quarantine of device %s has ended", device)
            self._events.append(Released(device))
            self._has_changed = True
        return self._events.pop(0) if self._events else None

    def sentence_of(self, device: str) -> tuple[float, str] | None:
        """End of a device's quarantine in seconds since 1970, and its reason; None without one."""
        ledger, now = self._ledgers.get(device), self._clock()
        if ledger is None or ledger.quarantined_until <= now:
            return None
        return self._wall() + ledger.quarantined_until - now, ledger.reason

    def sentences(self) -> dict[str, tuple[float, str]]:
        """The end and the reason of each present quarantine, by device."""
        names = sorted({name for _, name in self._quarantine_ends})
        return {name: sentence for name in names if (sentence := self.sentence_of(name)) is not None}

    def release(self, device: str) -> bool:
        """End a device's quarantine early; returns whether it was in one."""
        if self.sentence_of(device) is None or device not in self._ledgers:
            return False
        ledger, now = self._ledgers[device], self._clock()
        ledger.quarantined_until, ledger.refilled_at = now, now
        self._quarantine_ends = [(at, name) for at, name in self._quarantine_ends if name != device] + [(now, device)]
        heapq.heapify(self._quarantine_ends)
        self._has_changed = True
        return True

    def rows(self) -> dict[str, dict[str, Any]]:
        """Unused messages and quarantine of each device, and of strangers together, for JSON."""
        now, wall = self._clock(), self._wall()
        return {
            device: {
                **asdict(ledger.counts),
                "until": wall + ledger.quarantined_until - now if ledger.quarantined_until > now else None,
                "reason": ledger.reason,
            }
            for device, ledger in sorted([(STRANGERS, self._strangers), *self._ledgers.items()])
            if ledger.counts != UnusedMessages()
        }

    def save(self) -> None:
        """Save changes for `status`, every few seconds at most. A failing disk ends nothing: the file is for people."""
        now = self._clock()
        if self._path is None or not self._has_changed or now < self._next_save_at:
            return
        self._has_changed, self._next_save_at = False, now + _SAVE_INTERVAL_S
        try:
            with storage_errors(f"can't write {self._path}"):
                write_atomically(self._path, json.dumps(self.rows(), sort_keys=True).encode())
        except StorageError as error:
            log.warning("%s", error)

    def _ledger(self, device: str) -> _Ledger | None:
        ledger = self._ledgers.get(device)
        if ledger is None and (device in self.members or device in self._known):
            ledger = self._ledgers[device] = _Ledger(refilled_at=self._clock())
        return ledger

    def _charge(self, device: str, ledger: _Ledger, cost: float, now: float, reason: str) -> bool:
        """Charge points, and quarantine a device that has none left; returns whether it paid."""
        if now < ledger.quarantined_until:
            return False
        self._refill(ledger, now)
        ledger.points -= cost
        if ledger.points >= 0:
            return True
        self._sentence(device, ledger, reason)
        return False

    def _refill(self, ledger: _Ledger, now: float) -> None:
        ledger.points = min(MAX_POINTS, ledger.points + max(0.0, now - ledger.refilled_at) * POINTS_PER_S)
        ledger.refilled_at = max(now, ledger.refilled_at)

    def _sentence(self, device: str, ledger: _Ledger, reason: str) -> None:
        """Begin a quarantine, unless the device is in one."""
        now = self._clock()
        if now < ledger.quarantined_until:
            return
        if now - ledger.quarantined_until > FORGIVEN_AFTER_S:
            ledger.past_quarantines = 0
        seconds = min(MAX_QUARANTINE_S, FIRST_QUARANTINE_S * 2.0**ledger.past_quarantines)
        # 2**16 is far beyond `MAX_QUARANTINE_S` and no overflow.
        ledger.past_quarantines = min(ledger.past_quarantines + 1, 16)
        ledger.counts.times += 1
        ledger.quarantined_until, ledger.reason = now + seconds, reason
        ledger.points, ledger.refilled_at, ledger.credit, ledger.strikes = MAX_POINTS, now + seconds, 0, 0
        heapq.heappush(self._quarantine_ends, (ledger.quarantined_until, device))
        self._events.append(Quarantined(device, reason, seconds))
        self._has_changed = True
        log.warning(
            "device %s is in quarantine for %.0f s (quarantine no. %d): %s. Its messages are dropped unread; see the "
            "board's log and `fedprune-server status`",
            device, seconds, ledger.counts.times, reason,
        )  # fmt: skip

    def _charge_strangers(self, size: int, now: float) -> bool:
        """Charge the allowance that all strangers share for a message; returns whether it is paid."""
        ledger, cost = self._strangers, MESSAGE_COST + size / BYTES_PER_POINT
        ledger.points = min(MAX_STRANGER_POINTS, ledger.points + (now - ledger.refilled_at) * STRANGER_POINTS_PER_S)
        ledger.refilled_at = now
        if ledger.points >= cost:
            ledger.points -= cost
            return True
        ledger.counts.dropped += 1
        self._has_changed = True
        if now >= self._next_warning_at:
            self._next_warning_at = now + _WARNING_INTERVAL_S
            log.warning(
                "unknown devices, or clients in members' names, send too much: %d of their messages have been dropped "
                "unread. Check who uses your broker",
                ledger.counts.dropped,
            )
        return False


def read_quarantine_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a state folder's file; empty if it is missing or damaged."""
    try:
        body = json.loads((folder / QUARANTINE_FILE).read_bytes())
        blank_row = {**asdict(UnusedMessages()), "until": None, "reason": ""}
        return {str(device): {**blank_row, **dict(row)} for device, row in body.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
