"""The devices that a synchronous round asks, and those that it stops waiting for.

Places are drawn, keyed by the job's seed and the round. With the job's `fairness` a share of them goes to those instead
who were not asked for longest. A device that stays gets no place by turn twice before every other that was there has
had one: with n devices, a share p of them asked and fairness f, no device waits for more than ⌈1 / (f·p)⌉ rounds.

With `over_selection` more are asked than the round needs, and the slowest are dropped. So that this is not always the
same ones, a device that was dropped in `MAX_CUTS` rounds in a row is waited for in its next one, up to the deadline.

A job's `pace` is a factor. A round waits for a device up to `pace` times what half of its devices took from offer to
announcement. Once that half has announced, a device is dropped

- as *too slow* if it has taken longer than that already, or if its progress reports predict that it will: its training
  is assumed to go on at the rate between its first report and its last.

At any time, a device is dropped

- as *silent* if the next tenth of its training takes `pace` times as long as its tenths took so far.

All times are the server's: a device reports the share that it has done, never when. `deadline_s` remains the upper
limit. Devices are looked at every twentieth part of it, which is also the least time that any device is given, so that
the latency of messages and short pauses decide nothing. A device that has announced its update, or that has reported
its last step and is evaluating, has until the deadline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

import numpy as np

from fedprune.coordination.quotas import Places
from fedprune.coordination.ready_devices import Integers
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress, State, Task

MAX_CUTS = 3
"""Rounds in a row that may close before a device is done; its next one waits for it."""

ENOUGH = "enough updates are in"

PARTS = 10
"""Parts of a device's training of which the coordinator is notified."""

LOOKS = 20
"""How often devices are looked at while a deadline passes."""

SLOW = "much slower than the other devices of the round"
SILENT = "no progress for much longer than before"
LATE = "the deadline has passed"

TO_COME = (Progress.QUEUED, Progress.EXTRACTING)
"""The device has not been offered its part yet."""


def share_of(phase: str, done: int, total: int) -> float | None:
    """The share of its training that a device reports as done, from 0 to 1; None where the report doesn't tell.

    Args:
        phase: `download`, `train` or `evaluate`, which comes before training (0 done) and after it.
        done: Units done in this phase.
        total: Units of this phase.
    """
    if phase == "train" and total > 0:
        return min(done, total) / total
    return 1.0 if phase == "evaluate" and done > 0 else None


def news(task: Task, share: float) -> bool:
    """Whether the coordinator is notified of a report: the first, and one for every tenth."""
    return task.latest_report is None or math.floor(PARTS * share) > math.floor(PARTS * task.latest_report[1])


def note(task: Task, share: float, now: float) -> None:
    """Take in a report."""
    if task.progress is Progress.OFFERED and news(task, share):
        task.latest_report = [now, share]
        task.first_report = task.first_report or task.latest_report


class Pace:
    """The rule, with its numbers.

    Args:
        times: The job's `pace`.
        deadline_s: What everybody has at most.
    """

    def __init__(self, times: float, deadline_s: float) -> None:
        self._times = times
        self._least = deadline_s / LOOKS

    def bears(self, tasks: Collection[Task]) -> float:
        """Seconds from offer to announcement that a round waits for a device; infinity until half of them are in."""
        took = sorted(t.trained_s for t in tasks if t.trained_s is not None)
        half = (len(tasks) + 1) // 2
        return max(self._least, self._times * took[half - 1]) if len(took) >= half else math.inf

    def verdict(self, task: Task, bears: float, now: float) -> str:
        """Why a device that works on its offer is given up; empty if it isn't.

        Args:
            bears: The round's `bears`.
            now: The server's clock.
        """
        if task.progress is not Progress.OFFERED or task.offered_at is None:  # a restart lies between
            return ""
        if self._ends(task, now) - task.offered_at > bears:
            return SLOW
        return SILENT if self._quiet(task, now) else ""

    def _ends(self, task: Task, now: float) -> float:
        """The predicted end of its training, not before now."""
        rate = _rate(task)
        if rate is None or task.latest_report is None:
            return now
        at, share = task.latest_report
        return max(now, at + (1 - share) * rate)

    def _quiet(self, task: Task, now: float) -> bool:
        rate = _rate(task)
        if rate is None or task.latest_report is None or task.latest_report[1] >= 1:
            return False
        return now - task.latest_report[0] > max(self._least, self._times * rate / PARTS)


def _rate(task: Task) -> float | None:
    """Seconds for a whole training, as fast as it was so far; None before two reports."""
    if task.first_report is None or task.latest_report is None or task.latest_report[1] <= task.first_report[1]:
        return None
    return max(0.0, task.latest_report[0] - task.first_report[0]) / (task.latest_report[1] - task.first_report[1])


class Stragglers:
    """Decides by the state, and lets go.

    Args:
        pace: The rule by which devices are given up before the deadline, if the job has one.
    """

    def __init__(self, state: State, pace: Pace | None) -> None:
        self._state = state
        self._pace = pace
        self._changed = state.tasks.watch()
        self._waited_for = set[str]()

    def late(self, now: float, *, over: bool) -> list[tuple[str, Task, str]]:
        """Parts that are not waited for any longer, and why.

        Args:
            now: The shell's clock.
            over: Whether the round's own deadline has passed.
        """
        tasks = self._state.tasks
        bears = math.inf if self._pace is None else self._pace.bears(tasks.values())
        late = []
        for name, task in sorted(tasks.items()):
            if task.progress.over or task.progress is Progress.STORED:
                continue
            reason = self._pace.verdict(task, bears, now) if self._pace else ""
            if reason == SLOW and self._owed(name):
                reason = ""
            if over or (task.deadline is not None and task.deadline <= now):
                reason = LATE
            if reason:
                late.append((name, task, reason))
        return late

    def rest(self, tally: Counter[Progress]) -> list[tuple[str, Task]]:
        """The parts that a round needs no longer, as enough updates are in.

        What is on the disk already is waited for, and so are all while one is that was let go too often.
        """
        wanted = self._state.target_updates
        if not wanted or tally[Progress.FOLDED] < wanted or tally[Progress.STORED] or self._waits():
            return []
        return [(n, t) for n, t in sorted(self._state.tasks.items()) if not t.progress.over]

    def _waits(self) -> bool:
        """Whether a device works that others closed without too often; looks at the parts that have changed."""
        for name in self._changed:
            task = self._state.tasks.get(name)
            open_ = task is not None and not task.progress.over
            (self._waited_for.add if open_ and self._owed(name) else self._waited_for.discard)(name)
        self._changed.clear()
        return bool(self._waited_for)

    def let_go(self, name: str, task: Task, reason: str) -> None:
        """Wait for a device no longer. That is no failure of it; what counts is how often others were quicker."""
        device = self._state.devices[name]
        if reason not in (SLOW, ENOUGH):
            device.missed_rounds = 0  # it had all the time that anybody has
        elif device.online and task.progress not in TO_COME:
            device.missed_rounds += 1
        task.refuse(reason, FailureKind.LATE)

    def _owed(self, name: str) -> bool:
        """Whether a round waits for a device because others closed without it too often."""
        return self._state.devices[name].missed_rounds >= MAX_CUTS


def places(share: float, ready: int) -> int:
    """How many of the devices that are ready a round needs, at least one.

    Args:
        share: Above 0, at most 1.
        ready: How many there are, at least one.
    """
    return max(1, _ceil(share * ready))


def beyond(count: int, over_selection: float, ready: int) -> int:
    """How many a round asks that needs `count` of those that are ready."""
    return min(ready, _ceil(count * (1 + over_selection)))


def drawn(offered: Integers, count: int, fairness: float, free: Places) -> Integers:
    """Whom a round asks, as places in a random order of the devices that are ready.

    Args:
        offered: The round that each was last offered, in that order.
        count: How many to choose.
        fairness: Share of the places that goes by turn, from 0 to 1.
        free: The places that the job's quotas leave to each kind of device; there may be fewer than `count`.
    """
    chosen = np.zeros(len(offered), bool)
    if turns := _ceil(count * fairness):
        # The random order decides among those who have waited alike.
        chosen[free.take(np.argsort(offered, kind="stable"), turns)] = True
    chosen[free.take(np.flatnonzero(~chosen), count - int(np.count_nonzero(chosen)))] = True
    return np.flatnonzero(chosen)


def _ceil(value: float) -> int:
    """Up to the next whole number, but not for what only rounding has put above one."""
    return math.ceil(value - 1e-9)
