"""Quarantine of devices that flood the server or send unusable updates, so that other devices are not affected.

Every device has an allowance of points, which is refilled with time and with the server's messages that need an answer.
Each message costs points, by its size and by the work it causes. Requested chunks, and requests for blobs that the
device was offered, are free, up to a few times what the blob needs. So a board that delivers updates, fetches models,
or reconnects together with ten thousand others spends few points, whatever its speed, while a flood can't earn its own
points back. A device without points, or one that sends malformed updates, is quarantined: its messages are
dropped unread, for a minute at first and twice as long each time.

The accounting takes the same few steps for every message and keeps records of members only. Unknown names share one
allowance, because a stranger can choose any number of names.
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

from fedprune.blobs.blob_ref import LEAF
from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.messages import MAX_REQUEST

log = logging.getLogger("fedprune.server")

# File of the state folder, which `fedprune-server status` reads.
FILE = "quarantine.json"

# Maximum number of a device's points, and the points that it regains in a second.
BURST, PER_S = 4000.0, 20.0

# Cost of a message, and the bytes of it that cost another point.
MESSAGE, BYTES_PER_POINT = 1.0, 4096

# Additional cost of a birth: it makes the server plan, and write to its disk.
BIRTH = 30.0

# Cost of an invalid message, or one in another device's name. Messages of unknown types and versions cost nothing: a
# board with newer software sends them in good faith.
BAD = 50.0

# Points that a device gets for each message of the server that needs an answer.
EARNED = 2.0

# Free requests for an offered blob: a fixed number, and a number for each of its leaves.
FREE_WANTS, WANTS_PER_LEAF = 64, 4

# Points given back for a free request: the cost of its message, with its bytes.
_WANT = MESSAGE + 0.25
# Blobs whose requests are counted per device, the latest ones, which bounds the memory.
_BLOBS = 256

# Maximum bytes of chunks that a device may send without cost. A requested leaf adds twice its size, because it may come
# twice.
CREDIT = 4 * MAX_REQUEST * LEAF

# Malformed updates in a row that lead to quarantine.
STRIKES = 3

# Seconds of a device's first quarantine, and of its longest: each one is twice as long as the last.
FIRST_S, LONGEST_S = 60.0, 3600.0

# Seconds without a quarantine after which the next one lasts `FIRST_S` again.
FORGIVEN_S = 24 * 3600.0

# Maximum points that all unknown devices have together, and that they regain in a second.
STRANGERS_BURST, STRANGERS_PER_S = 100_000.0, 1000.0

# Seconds for which requests to join count as flooded after some were dropped.
CROWDED_S = 60.0

_SAVE_S, _TELL_S = 10.0, 600.0


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
class Counts:
    """Counts of a device's unused messages since the server's start."""

    dropped: int = 0
    bad: int = 0
    unasked: int = 0
    refused: int = 0
    times: int = 0


@dataclass(slots=True)
class _Ledger:
    points: float = BURST
    at: float = 0.0
    credit: int = 0
    fetching: dict[str, int] = field(default_factory=dict)
    strikes: int = 0
    level: int = 0
    until: float = 0.0
    reason: str = ""
    counts: Counts = field(default_factory=Counts)


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
        self._strangers = _Ledger(STRANGERS_BURST, clock())
        self._crowd: tuple[str, float] | None = None
        self._crowded_at = -CROWDED_S
        self._news: list[Quarantined | Released] = []
        self._ends: list[tuple[float, str]] = []
        self._dirty = path is not None and path.exists()
        self._save_at = self._tell_at = clock()

    def know(self, devices: Iterable[str]) -> None:
        """Give devices an allowance each. The caller limits their number."""
        self._known.update(devices)

    def hears(self, device: str, size: int, *, chunk: bool = False) -> bool:
        """Charge a device for a message, or for a chunk of a blob; returns whether the server may read it."""
        ledger, now = self._ledger(device), self._clock()
        if ledger is None:
            return self._stranger(MESSAGE + size / BYTES_PER_POINT, now)
        if now < ledger.until:
            ledger.counts.dropped += 1
            self._dirty = True
            return False
        if chunk:
            requested = min(ledger.credit, size)
            ledger.credit -= requested
            if requested == size:
                return True
            ledger.counts.unasked += 1
            size -= requested
        cost = MESSAGE + size / BYTES_PER_POINT
        is_paid = self._charge(
            device, ledger, cost, now, "chunks that the server didn't ask for" if chunk else "too many messages"
        )
        ledger.counts.dropped += not is_paid
        return is_paid

    def ignores(self, topic: str) -> bool:
        """Whether messages of a topic are dropped unread; may be called from any thread."""
        levels = topic.split("/", 4)
        ledger = self._ledgers.get(levels[3]) if len(levels) > 3 else None
        if ledger is None or self._clock() >= ledger.until:
            return False
        ledger.counts.dropped += 1
        self._dirty = True
        return True

    def sends(self, device: str) -> None:
        """Credit a device for a message that needs an answer."""
        if (ledger := self._ledger(device)) is not None:
            self._refill(ledger, self._clock())
            ledger.points = min(BURST, ledger.points + EARNED)

    def fetches(self, device: str, sha256: str, leaves: int) -> None:
        """Charge a request for a part of an offered blob, which has this number of leaves. All of the blob may be
        requested a few times without cost."""
        if (ledger := self._ledger(device)) is None:
            return
        used_requests = ledger.fetching.pop(sha256, 0)
        is_free = used_requests < FREE_WANTS + WANTS_PER_LEAF * leaves  # a blob that is still coming has no leaves yet
        if is_free:
            self._refill(ledger, self._clock())
            ledger.points = min(BURST, ledger.points + _WANT)
        ledger.fetching[sha256] = used_requests + is_free
        if len(ledger.fetching) > _BLOBS:
            del ledger.fetching[next(iter(ledger.fetching))]

    def asked(self, device: str, leaves: int) -> None:
        """Credit a device for requested leaves, each of which may come twice."""
        if (ledger := self._ledger(device)) is not None:
            ledger.credit = min(CREDIT, ledger.credit + 2 * leaves * (LEAF + 64))

    def born(self, device: str) -> None:
        """Charge an announcement."""
        if device not in self.members:
            self.know([device])
        if (ledger := self._ledger(device)) is not None:
            self._charge(device, ledger, BIRTH, self._clock(), "it announces itself again and again")

    def bad(self, device: str) -> None:
        """Charge an invalid message."""
        if (ledger := self._ledger(device)) is not None:
            ledger.counts.bad += 1
            self._charge(device, ledger, BAD, self._clock(), "messages that make no sense")
        else:
            self._stranger(BAD, self._clock())

    def crowded(self, client: str) -> None:
        """Note that requests to join fill their inbox, so that its connection is closed for a while.

        Args:
            client: MQTT client id of the flooding client; empty if many clients send a few requests each. Only the
                latest client is stored: a stranger can choose any number of ids.
        """
        now = self._clock()
        is_logged, self._crowded_at = now < self._crowded_at + CROWDED_S, now
        if not client:
            if not is_logged:
                log.warning(
                    "more boards ask to join than this server answers at a time: some wait longer, and ask again. If "
                    "you don't expect them, close the listener for joining"
                )
            return
        client = one_line(client, 64)
        if not self.floods_joins():
            log.warning(
                "the MQTT client %s floods the topic for joining: requests to join are dropped, those of %s first. "
                "The broker's log has its address; close the listener for joining while no board is to join",
                client, client,
            )  # fmt: skip
        self._crowd = client, now + CROWDED_S

    def floods_joins(self) -> str | None:
        """The MQTT client id that flooded the requests to join within `CROWDED_S`; empty if only many clients together
        did, None if none did.
        """
        now = self._clock()
        if self._crowd is not None and self._crowd[1] > now:
            return self._crowd[0]
        return "" if now < self._crowded_at + CROWDED_S else None

    def refused(self, device: str, kind: str, reason: str) -> None:
        """Note that a device's update was rejected. Only `FailureKind.MALFORMED` counts.

        Other kinds happen to honest devices: diverged training makes weights that are far too large, and a device may
        no longer have its update.
        """
        ledger = self._ledger(device)
        if ledger is None or kind != FailureKind.MALFORMED:
            return
        ledger.counts.refused += 1
        ledger.strikes += 1
        self._dirty = True
        if ledger.strikes >= STRIKES and self._clock() >= ledger.until:
            self._sentence(device, ledger, f"{STRIKES} malformed updates in a row, the last one: {reason[:200]}")

    def counted(self, device: str) -> None:
        """Note that a device's update was aggregated, which ends a row of malformed ones."""
        if (ledger := self._ledger(device)) is not None:
            ledger.strikes = 0

    def news(self) -> Quarantined | Released | None:
        """The next device whose quarantine has begun or ended; None if there is none."""
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            _, device = heapq.heappop(self._ends)
            log.info("the quarantine of device %s has ended", device)
            self._news.append(Released(device))
            self._dirty = True
        return self._news.pop(0) if self._news else None

    def held(self, device: str) -> tuple[float, str] | None:
        """End of a device's quarantine in seconds since 1970, and its reason; None without one."""
        ledger, now = self._ledgers.get(device), self._clock()
        if ledger is None or ledger.until <= now:
            return None
        return self._wall() + ledger.until - now, ledger.reason

    def sentences(self) -> dict[str, tuple[float, str]]:
        """The end and the reason of each present quarantine, by device."""
        names = sorted({name for _, name in self._ends})
        return {name: sentence for name in names if (sentence := self.held(name)) is not None}

    def release(self, device: str) -> bool:
        """End a device's quarantine early; returns whether it was in one."""
        if self.held(device) is None or device not in self._ledgers:
            return False
        ledger, now = self._ledgers[device], self._clock()
        ledger.until, ledger.at = now, now
        self._ends = [(at, name) for at, name in self._ends if name != device] + [(now, device)]
        heapq.heapify(self._ends)
        self._dirty = True
        return True

    def rows(self) -> dict[str, dict[str, Any]]:
        """Unused messages and quarantine of each device, for JSON."""
        now, wall = self._clock(), self._wall()
        return {
            device: {
                **asdict(ledger.counts),
                "until": wall + ledger.until - now if ledger.until > now else None,
                "reason": ledger.reason,
            }
            for device, ledger in sorted(self._ledgers.items())
            if ledger.counts != Counts()
        }

    def save(self) -> None:
        """Save changes for `status`, every few seconds at most. A failing disk ends nothing: the file is for people."""
        now = self._clock()
        if self._path is None or not self._dirty or now < self._save_at:
            return
        self._dirty, self._save_at = False, now + _SAVE_S
        try:
            with storage_errors(f"can't write {self._path}"):
                write_whole(self._path, json.dumps(self.rows(), sort_keys=True).encode())
        except StorageError as error:
            log.warning("%s", error)

    def _ledger(self, device: str) -> _Ledger | None:
        ledger = self._ledgers.get(device)
        if ledger is None and (device in self.members or device in self._known):
            ledger = self._ledgers[device] = _Ledger(at=self._clock())
        return ledger

    def _charge(self, device: str, ledger: _Ledger, cost: float, now: float, reason: str) -> bool:
        """Charge points, and quarantine a device that has none left; returns whether it paid."""
        if now < ledger.until:
            return False
        self._refill(ledger, now)
        ledger.points -= cost
        if ledger.points >= 0:
            return True
        self._sentence(device, ledger, reason)
        return False

    def _refill(self, ledger: _Ledger, now: float) -> None:
        ledger.points = min(BURST, ledger.points + max(0.0, now - ledger.at) * PER_S)
        ledger.at = max(now, ledger.at)

    def _sentence(self, device: str, ledger: _Ledger, reason: str) -> None:
        """Begin a quarantine, unless the device is in one."""
        now = self._clock()
        if now < ledger.until:
            return
        if now - ledger.until > FORGIVEN_S:
            ledger.level = 0
        seconds = min(LONGEST_S, FIRST_S * 2.0**ledger.level)
        ledger.level = min(ledger.level + 1, 16)  # 2**16 is far beyond `LONGEST_S` and no overflow
        ledger.counts.times += 1
        ledger.until, ledger.reason = now + seconds, reason
        ledger.points, ledger.at, ledger.credit, ledger.strikes = BURST, now + seconds, 0, 0
        heapq.heappush(self._ends, (ledger.until, device))
        self._news.append(Quarantined(device, reason, seconds))
        self._dirty = True
        log.warning(
            "device %s is in quarantine for %.0f s (quarantine no. %d): %s. Its messages are dropped unread; see the "
            "board's log and `fedprune-server status`",
            device, seconds, ledger.counts.times, reason,
        )  # fmt: skip

    def _stranger(self, cost: float, now: float) -> bool:
        """Charge the allowance that all unknown names share; returns whether the message is paid."""
        ledger = self._strangers
        ledger.points = min(STRANGERS_BURST, ledger.points + (now - ledger.at) * STRANGERS_PER_S)
        ledger.at = now
        if ledger.points >= cost:
            ledger.points -= cost
            return True
        ledger.counts.dropped += 1
        if now >= self._tell_at:
            self._tell_at = now + _TELL_S
            log.warning(
                "unknown devices send too much: %d of their messages have been dropped unread. Check who uses your "
                "broker",
                ledger.counts.dropped,
            )
        return False


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a state folder's file; empty if it is missing or damaged."""
    try:
        body = json.loads((folder / FILE).read_bytes())
        return {str(device): {**_BLANK, **dict(row)} for device, row in body.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


_BLANK: dict[str, Any] = {**asdict(Counts()), "until": None, "reason": ""}
