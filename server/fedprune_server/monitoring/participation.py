"""Which boards no longer take part, and why: worked out here alone, shown by log, status, doctor, console and alerts.

A board may fail in silence: its card was copied, its disk is full, its samples can't be read, it has no power. Rounds
go on without it, so the time that counts is rounds and not hours: whatever keeps a board away is named before a third
round ends without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.coordination import Phase
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.schedule import SYNCHRONOUS
from fedprune.jobs.state import Progress
from fedprune.strategies import compose
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.view import UNDER_WAY, JobView

QUARANTINE, CLONED, EXCLUDED = "quarantine", "device-cloned", "device-excluded"
UNDELIVERED, FAILING, AWAY = "broker-drops", "device-failing", "device-away"

FAILED_ROUNDS = 2
"""Rounds in a row without an update that counts after which a board is named: one alone may be bad luck."""

_LASTING_FAILURES = frozenset({FailureKind.NO_ROOM, FailureKind.DATA})
"""Failures that the next round won't mend, so that the first one is enough."""

_BLAMELESS_FAILURES = frozenset({
    FailureKind.OUTLIER, FailureKind.STALE, FailureKind.QUARANTINED, FailureKind.REVOKED, FailureKind.LEFT_OUT,
    FailureKind.FALSE_SUM,
})  # fmt: skip
"""Failures that are no board's fault, or have an alert of their own."""

_MAX_REASON_LENGTH = 400


@dataclass(frozen=True)
class Absence:
    """Why a board doesn't take part.

    Attributes:
        kind: The alert's.
        reason: A sentence whose subject is the board.
        since: When that began, in seconds since 1970.
    """

    kind: str
    reason: str
    since: float


def format_minute(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def exclusion_absence(reason: str, since: float) -> Absence:
    return Absence(EXCLUDED, f"takes no part: {one_line(reason, _MAX_REASON_LENGTH)}", since)


def quarantine_absence(reason: str, since: float) -> Absence:
    return Absence(QUARANTINE, f"is in quarantine: {one_line(reason, _MAX_REASON_LENGTH)}", since)


class Participation(Observer):
    """Watches the boards of one job. Times are in seconds since 1970.

    Args:
        away_rounds: Rounds that end without a board after which it counts as away; 0 to watch for none.
        present: Whether a board is connected, at whatever job; None to go by the job alone.
        away: Since when boards were away, at whatever job, as the server's last run ended.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        view: JobView,
        away_rounds: int,
        present: Callable[[str], bool] | None,
        away: Mapping[str, float],
        clock: Callable[[], float],
    ) -> None:
        self._view, self._away_rounds, self._clock = view, away_rounds, clock
        self._is_present = present or (lambda name: False)
        self._schedule = schedule = compose(view.job).schedule or SYNCHRONOUS
        # Rounds that close before all boards are done, on purpose: who is late then has done nothing wrong.
        self._closes_early = schedule.asynchronous or view.job.over_selection > 0
        self._exclusions: dict[str, Absence] = {}
        away = {name: at for name, at in away.items() if away_rounds and name in view.state.devices}
        self._away_since: dict[str, float] = dict(away)
        self._rounds_away: dict[str, int] = dict.fromkeys(away, away_rounds)  # of boards that aren't connected
        self._away = set(away)  # of them those for whose absence that is enough
        self._failures: dict[str, tuple[int, str, str, float]] = {}  # rounds in a row, last kind and reason, since when
        self.noticed(view.state.devices.keys())

    def noticed(self, devices: Collection[str]) -> None:
        for name in devices:
            device = self._view.state.devices.get(name)
            if device is None or device.online:
                self._rounds_away.pop(name, None)
                self._away_since.pop(name, None)
                self._away.discard(name)
            else:
                self._rounds_away.setdefault(name, 0)
                self._away_since.setdefault(name, self._clock())
            # Boards that could never take part are listed by doctor; what is new is one that did.
            if device is not None and device.excluded and (device.last_counted_round or device.excluded_by):
                if name not in self._exclusions:
                    self._exclusions[name] = exclusion_absence(device.excluded, self._clock())
            else:
                self._exclusions.pop(name, None)

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        for name in self._rounds_away:
            if self._is_present(name):
                self._rounds_away[name], self._away_since[name] = 0, self._clock()
            else:
                self._rounds_away[name] += 1
        if self._away_rounds:
            self._away = {name for name, count in self._rounds_away.items() if count >= self._away_rounds}
        for name, part in summary["devices"].items():
            self._count_failure(name, part, summary["round"])

    def _count_failure(self, name: str, part: Mapping[str, Any], number: int) -> None:
        kind = part.get("kind", "")
        if part["progress"] == Progress.FOLDED.value:
            self._failures.pop(name, None)
            return
        late = not part["reason"] or kind == FailureKind.LATE
        if kind in _BLAMELESS_FAILURES or (late and self._closes_early):
            return
        if not late:
            alert_kind, reason = FAILING, one_line(part["reason"], _MAX_REASON_LENGTH)
        elif self._is_offline(name):
            alert_kind, reason = AWAY, f"it was offline when the deadline of round {number} passed"
        else:
            alert_kind, reason = FAILING, self._late_reason(name)
        count, _, _, since = self._failures.get(name, (0, "", "", self._clock()))
        min_count = FAILED_ROUNDS if kind in _LASTING_FAILURES else 0
        self._failures[name] = (max(count + 1, min_count), alert_kind, reason, since)

    def _is_offline(self, name: str) -> bool:
        return name in self._away_since and not self._is_present(name)

    def _late_reason(self, name: str) -> str:
        crash = self._view.registry.crashes.get(name)
        return "it was late" if crash is None else f"it was late, and its program ended: {crash}"

    def awaited_offline(self) -> dict[str, float]:
        """Since when the boards are offline for which alone a synchronous round waits; empty while it waits for
        others, too, or for none."""
        state = self._view.state
        if state.phase is not Phase.TRAINING or self._schedule.asynchronous:
            return {}
        if not 0 < state.tasks.count(*UNDER_WAY) <= len(self._away_since):
            return {}  # without a look at each part
        names = [name for name, task in state.tasks.items() if task.progress in UNDER_WAY]
        return {name: self._away_since[name] for name in names} if all(map(self._is_offline, names)) else {}

    def absences(self) -> dict[str, Absence]:
        """Boards that no longer take part in the job; none where it is paused or finished."""
        revoked = self._view.revoked()
        return {name: absence for name, absence in self._absences_with_revoked().items() if name not in revoked}

    def _absences_with_revoked(self) -> dict[str, Absence]:
        """The same, with boards that were revoked."""
        state, registry = self._view.state, self._view.registry
        absences = {
            name: Absence(CLONED, f"seems to be two boards: {reason}", self._clock())
            for name, reason in registry.clones.suspicions().items()
        }
        if state.paused or state.phase is Phase.FINISHED:
            return absences
        for name, reason in registry.drop_reasons().items():
            absences.setdefault(name, Absence(UNDELIVERED, reason, self._clock()))
        for name, body in registry.outsiders.items():
            device = state.devices.get(name)
            if body.get("cannot_start") or (device is not None and device.last_counted_round):
                absences.setdefault(name, exclusion_absence(str(body["excluded"]), self._clock()))
        absences = self._exclusions | absences  # a copy of its card, or a broker that drops messages, explains more
        for name in self._away:
            if not self._is_present(name):
                since = self._away_since[name]
                what = f"has not been connected since {format_minute(since)}, and rounds end without it"
                absences.setdefault(name, Absence(AWAY, what, since))
        for name, reason in registry.silence_reasons().items():
            absences.setdefault(name, self._failing(name, FAILING, reason, self._clock()))
        for name, (count, kind, reason, since) in self._failures.items():
            if count >= FAILED_ROUNDS and name in state.devices:
                what = f"sends no update that counts: {reason}"
                absences.setdefault(name, self._failing(name, kind, what, since))
        return absences

    def _failing(self, name: str, kind: str, reason: str, since: float) -> Absence:
        """A board whose parts come to nothing. While it is offline, its connection is what has to be mended."""
        if not self._is_offline(name):
            return Absence(kind, reason, since)
        away_since = self._away_since[name]
        return Absence(AWAY, f"has not been connected since {format_minute(away_since)}; it {reason}", away_since)


def find_absent_boards(watches: Sequence[Participation], view: JobView, now: float) -> dict[str, Absence]:
    """Boards that don't take part, at any job of a server; a board has the first reason that explains the others.

    Args:
        view: The first job's, whose quarantine is the server's.
    """
    absences: dict[str, Absence] = {}
    for watch in watches:
        for name, absence in watch.absences().items():
            absences.setdefault(name, absence)
    for name in view.quarantine.all_held():
        sentence = view.quarantine.held(name)
        # Of two boards with one key the server understands little, so that it may put them in quarantine.
        if sentence is not None and (name not in absences or absences[name].kind != CLONED):
            absences[name] = quarantine_absence(sentence[1], now)
    return absences
