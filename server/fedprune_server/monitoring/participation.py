"""Decides which boards no longer take part in a job, and why; log, status, doctor, console and alerts show it.

A board may fail in silence: its card was copied, its disk is full, its samples can't be read, it has no power. Rounds
go on without it, so the time that counts is rounds and not hours: whatever keeps a board away is named before a third
round ends without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune.wire.lost_pieces import dropping_broker_message
from fedprune_server.observation.observer import DevicesChanged, RoundEnded, TurnEvent, handle_each
from fedprune_server.observation.snapshot import AWAITED_PROGRESS, FleetSnapshot, JobSnapshot

QUARANTINE, CLONED, EXCLUDED = "quarantine", "device-cloned", "device-excluded"
UNDELIVERED, FAILING, AWAY = "broker-drops", "device-failing", "device-away"

# A board that hasn't answered its offer for `registry.SLOW_S` is slow. After this many seconds, in which the offer was
# sent four times more, it is broken.
BROKEN_S = 120.0

# A board is named after so many rounds in a row without an update that counts: a single one may be bad luck.
FAILED_ROUNDS = 2

# Failures that the next round won't mend, so that the first one is enough: a full disk stays full.
_LASTING_FAILURES = frozenset({FailureKind.NO_ROOM, FailureKind.DATA})

# Failures that aren't the board's fault, or have an alert of their own.
_BLAMELESS_FAILURES = frozenset({
    FailureKind.OUTLIER, FailureKind.STALE, FailureKind.QUARANTINED, FailureKind.REVOKED, FailureKind.LEFT_OUT,
    FailureKind.FALSE_SUM,
})  # fmt: skip

# Reasons come from boards, as texts of any length; logs, mails and table cells show them.
_MAX_REASON_LENGTH = 400


@dataclass(frozen=True)
class Absence:
    """The reason why a board doesn't take part.

    Attributes:
        kind: The alert's.
        reason: A sentence whose subject is the board.
        since: When that began, in seconds since 1970.
        is_slow: Whether the board may only be slow, so that this is a note.
    """

    kind: str
    reason: str
    since: float
    is_slow: bool = False


def format_minute(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def exclusion_absence(reason: str, since: float) -> Absence:
    return Absence(EXCLUDED, f"takes no part: {one_line(reason, _MAX_REASON_LENGTH)}", since)


def quarantine_absence(reason: str, since: float) -> Absence:
    return Absence(QUARANTINE, f"is in quarantine: {one_line(reason, _MAX_REASON_LENGTH)}", since)


class Participation:
    """Watches the boards of one job. Times are in seconds since 1970.

    Args:
        away_rounds: Rounds that end without a board until it counts as away; 0 to watch for none.
        away: The beginning of each board's absence from any job, as the server's last run noted it.
    """

    def __init__(
        self, snapshot: JobSnapshot, away_rounds: int, away: Mapping[str, float], clock: Callable[[], float]
    ) -> None:
        self._snapshot, self._away_rounds, self._clock = snapshot, away_rounds, clock
        self._exclusions: dict[str, Absence] = {}
        away = {name: since for name, since in away.items() if away_rounds and _takes_part(snapshot, name)}
        self.away_since: dict[str, float] = dict(away)  # since when boards are offline, or at another job
        self._rounds_away: dict[str, int] = dict.fromkeys(away, away_rounds)  # of boards that aren't connected
        self._absent_boards = set(away)  # boards that were away for enough rounds
        # Rounds in a row without an update that counts, kind of alert, last reason, since when.
        self._failures: dict[str, tuple[int, str, str, float]] = {}
        # Devices to update: not in every turn, since many change in each.
        self._changed_devices = set(snapshot.devices)

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._snapshot = snapshot
        handle_each(events, self._handle)

    def _handle(self, event: TurnEvent) -> None:
        match event.payload:
            case DevicesChanged(names):
                self._changed_devices |= names
            case RoundEnded() as end:
                self.update()
                self._end_round(end)

    def update(self) -> None:
        """Update the devices that have changed since the last call. Call it before `absences`."""
        names, self._changed_devices = self._changed_devices, set()
        for name in names:
            device = self._snapshot.devices.get(name)
            if device is None or not device.takes_part or device.online:
                self._rounds_away.pop(name, None)
                self.away_since.pop(name, None)
                self._absent_boards.discard(name)
            else:
                self._rounds_away.setdefault(name, 0)
                self.away_since.setdefault(name, self._clock())
            # Only a board that did take part is news. Boards that never could are listed by `doctor`.
            if device is not None and device.excluded and (device.last_counted_round or device.excluded_by):
                if name not in self._exclusions:
                    self._exclusions[name] = exclusion_absence(device.excluded, self._clock())
            else:
                self._exclusions.pop(name, None)

    def _end_round(self, end: RoundEnded) -> None:
        for name in self._rounds_away:
            if self._is_connected(name):
                self._rounds_away[name], self.away_since[name] = 0, self._clock()
            else:
                self._rounds_away[name] += 1
        if self._away_rounds:
            self._absent_boards = {name for name, count in self._rounds_away.items() if count >= self._away_rounds}
        for name, device_part in end.summary["devices"].items():
            self._count_failure(name, device_part, end.summary["round"], is_reached=name not in end.unreached)

    def _is_connected(self, name: str) -> bool:
        return name in self._snapshot.fleet.connected_devices

    def _count_failure(self, name: str, device_part: Mapping[str, Any], number: int, *, is_reached: bool) -> None:
        kind = device_part.get("kind", "")
        if device_part["progress"] == Progress.FOLDED.value:
            self._failures.pop(name, None)
            return
        is_late = not device_part["reason"] or kind == FailureKind.LATE
        if kind in _BLAMELESS_FAILURES or (is_late and self._snapshot.closes_early):
            return
        if is_late and not is_reached and not self._is_offline(name):
            return  # the server was late: it has not sent the offer
        if not is_late:
            alert_kind, reason = FAILING, one_line(device_part["reason"], _MAX_REASON_LENGTH)
        elif self._is_offline(name):
            alert_kind, reason = AWAY, f"it was offline when the deadline of round {number} passed"
        else:
            crash = self._snapshot.crashes.get(name)
            alert_kind, reason = FAILING, "it was late" + (f", and its program ended: {crash}" if crash else "")
        count, _, _, since = self._failures.get(name, (0, "", "", self._clock()))
        min_count = FAILED_ROUNDS if kind in _LASTING_FAILURES else 0
        self._failures[name] = (max(count + 1, min_count), alert_kind, reason, since)

    def _is_offline(self, name: str) -> bool:
        return name in self.away_since and not self._is_connected(name)

    def offline_since(self) -> dict[str, float]:
        """Since when boards are offline, if a synchronous round waits only for offline boards; empty otherwise."""
        snapshot = self._snapshot
        awaited = () if snapshot.is_asynchronous else AWAITED_PROGRESS
        under_way = sum(snapshot.parts_by_progress.get(progress, 0) for progress in awaited)
        if not 0 < under_way <= len(self.away_since):
            return {}  # decided by counts, without reading each part
        is_stalled = all(map(self._is_offline, snapshot.awaited_devices))
        return {name: self.away_since[name] for name in snapshot.awaited_devices} if is_stalled else {}

    def absences(self) -> dict[str, Absence]:
        """Boards that no longer take part in the job; none where it is paused or finished."""
        revoked = self._snapshot.revoked_devices
        return {name: absence for name, absence in self._absences_with_revoked().items() if name not in revoked}

    def _absences_with_revoked(self) -> dict[str, Absence]:
        """The same as `absences`, including revoked boards."""
        snapshot = self._snapshot
        absences = {
            name: Absence(CLONED, f"seems to be two boards: {reason}", self._clock())
            for name, reason in snapshot.cloned_devices.items()
        }
        if snapshot.is_paused or snapshot.is_finished:
            return absences
        for name, reason in snapshot.undelivered_devices.items():
            # After a restart requests also go to boards that haven't announced themselves yet: their wills may be lost.
            if self._is_connected(name):
                absences.setdefault(name, Absence(UNDELIVERED, reason, self._clock()))
        for name, body in snapshot.unplanned_devices.items():
            if body.get("cannot_start") or snapshot.devices[name].last_counted_round:
                absences.setdefault(name, exclusion_absence(str(body["excluded"]), self._clock()))
        exclusions = {n: self._failure_absence(n, EXCLUDED, a.reason, a.since) for n, a in self._exclusions.items()}
        absences = exclusions | absences  # a copy of its card, or a broker that drops messages, explains more
        for name in self._absent_boards:
            if not self._is_connected(name):
                since = self.away_since[name]
                sentence = f"has not been connected since {format_minute(since)}, and rounds end without it"
                absences.setdefault(name, Absence(AWAY, sentence, since))
        for name, (count, kind, reason, since) in self._failures.items():
            if count >= FAILED_ROUNDS and _takes_part(snapshot, name):
                sentence = f"sends no update that counts: {reason}"
                absences.setdefault(name, self._failure_absence(name, kind, sentence, since))
        for name, silence_s in snapshot.silent_devices.items():
            if (absence := self._silence(name, silence_s)) is not None:
                absences.setdefault(name, absence)
        return absences

    def _silence(self, name: str, silence_s: float) -> Absence | None:
        """A board that hasn't answered its offer for so long; None for one at another job, or offline too soon."""
        since, is_offline = self._clock() - silence_s, self._is_offline(name)
        if is_offline:  # it is judged by the time in which it could have answered
            silence_s = self.away_since[name] - since
        is_slow = silence_s < BROKEN_S
        if not self._snapshot.devices[name].online and (is_slow or not is_offline):
            return None
        sentence = f"has answered no offer since {format_minute(since)}, though it was repeated: it is slow"
        if is_slow:
            return Absence(FAILING, sentence, since, is_slow=True)
        sentence += ", its program hangs, or " + dropping_broker_message("what it sends or is sent")
        return self._failure_absence(name, FAILING, sentence, since)

    def _failure_absence(self, name: str, kind: str, reason: str, since: float) -> Absence:
        """A board whose parts come to nothing. While it is offline, its connection is what has to be mended."""
        if not self._is_offline(name):
            return Absence(kind, reason, since)
        away_since = self.away_since[name]
        return Absence(AWAY, f"has not been connected since {format_minute(away_since)}; it {reason}", away_since)


def find_absent_boards(watches: Iterable[Participation], fleet: FleetSnapshot, now: float) -> dict[str, Absence]:
    """Boards that take part in no job of a server, each with the reason that explains the others."""
    absences: dict[str, Absence] = {}
    for watch in watches:
        for name, absence in watch.absences().items():
            absences.setdefault(name, absence)
    for name, (_, reason) in fleet.quarantines.items():
        # Two boards with one key disturb each other's messages, which may lead to a quarantine: the copy is the cause.
        if name not in absences or absences[name].kind != CLONED:
            absences[name] = quarantine_absence(reason, now)
    return absences


def _takes_part(snapshot: JobSnapshot, name: str) -> bool:
    return (device := snapshot.devices.get(name)) is not None and device.takes_part
