"""Whom a synchronous round stops waiting for: those who are late, who are too slow or silent, and who aren't needed."""

from __future__ import annotations

import math
from collections import Counter

from fedprune.coordination.pace import SLOW, Pace
from fedprune.coordination.sampling import ENOUGH, MAX_CUTS
from fedprune.jobs.state import Progress, State, Task

LATE = "the deadline has passed"

TO_COME = (Progress.QUEUED, Progress.EXTRACTING)
"""The device has not been offered its part yet."""


class Dismissal:
    """Decides by the state, and lets go.

    Args:
        state: The coordinator's.
        pace: The rule by which devices are given up before the deadline, if the job has one.
    """

    def __init__(self, state: State, pace: Pace | None) -> None:
        self._state = state
        self._pace = pace

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

        Args:
            tally: How many parts are how far.
        """
        wanted = self._state.wanted
        if not wanted or tally[Progress.FOLDED] < wanted or tally[Progress.STORED]:
            return []
        rest = [(n, t) for n, t in sorted(self._state.tasks.items()) if not t.progress.over]
        return [] if any(self._owed(n) for n, _ in rest) else rest

    def let_go(self, name: str, task: Task, reason: str) -> None:
        """Wait for a device no longer. That is no failure of it; what counts is how often others were quicker."""
        device = self._state.devices[name]
        if reason not in (SLOW, ENOUGH):
            device.cut = 0  # it had all the time that anybody has
        elif device.online and task.progress not in TO_COME:
            device.cut += 1
        task.progress, task.reason = Progress.REFUSED, reason

    def _owed(self, name: str) -> bool:
        """Whether a device is waited for, since it was let go so often."""
        return self._state.devices[name].cut >= MAX_CUTS
