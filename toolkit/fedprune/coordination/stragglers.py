"""How many devices a synchronous round asks, and those that it stops waiting for.

Devices are drawn, keyed by the job's seed and the round. With `over_selection` a round asks more devices than it needs,
and the slowest are dropped. To avoid dropping the same devices each time, a device that was dropped in
`MAX_MISSED_ROUNDS` rounds in a row is waited for in its next round, up to the deadline.
"""

from __future__ import annotations

import math
from collections import Counter

from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import DeviceTask, Progress, State

# Rounds in a row in which a device may be dropped; the round after them waits for it.
MAX_MISSED_ROUNDS = 3

ENOUGH_UPDATES = "enough updates are in"

# How often devices are looked at while a deadline passes, where each has a deadline of its own.
LOOKS_PER_DEADLINE = 20

DEADLINE_PASSED = "the deadline has passed"

# The device has not been offered its part yet.
BEFORE_OFFER = (Progress.QUEUED, Progress.EXTRACTING)


class Stragglers:
    """Decides by a job's state for which devices a round no longer waits."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._changed = state.tasks.watch()
        self._waited_for = set[str]()

    def late_tasks(self, now: float, *, is_over: bool) -> list[tuple[str, DeviceTask]]:
        """Parts that are not waited for any longer.

        Args:
            now: The shell's clock.
            is_over: Whether the round's own deadline has passed.
        """
        return [
            (name, task)
            for name, task in sorted(self._state.tasks.items())
            if not task.progress.is_over
            and task.progress is not Progress.STORED
            and (is_over or (task.deadline is not None and task.deadline <= now))
        ]

    def dispensable_tasks(self, tally: Counter[Progress]) -> list[tuple[str, DeviceTask]]:
        """The parts that a round needs no longer, as enough updates are in.

        There are none while an update is on the disk but not checked, or while the round waits for a device that was
        dropped too often.
        """
        target = self._state.target_updates
        if not target or tally[Progress.FOLDED] < target or tally[Progress.STORED] or self._waits_for_missed_device():
            return []
        return [(n, t) for n, t in sorted(self._state.tasks.items()) if not t.progress.is_over]

    def _waits_for_missed_device(self) -> bool:
        """Whether the round waits for a device that was dropped too often; only changed parts are looked at."""
        for name in self._changed:
            task = self._state.tasks.get(name)
            is_open = task is not None and not task.progress.is_over
            (self._waited_for.add if is_open and self._missed_too_often(name) else self._waited_for.discard)(name)
        self._changed.clear()
        return bool(self._waited_for)

    def stop_waiting(self, name: str, task: DeviceTask, reason: str) -> None:
        """Stop waiting for a device. This is no failure of it; how often it was dropped in a row is counted."""
        device = self._state.devices[name]
        if reason != ENOUGH_UPDATES:
            device.missed_rounds = 0  # it had the whole time until its deadline
        elif device.online and task.progress not in BEFORE_OFFER:
            device.missed_rounds += 1
        task.refuse(reason, FailureKind.LATE)

    def _missed_too_often(self, name: str) -> bool:
        """Whether a device was dropped in so many rounds that the present one waits for it."""
        return self._state.devices[name].missed_rounds >= MAX_MISSED_ROUNDS


def needed_devices(share: float, ready: int) -> int:
    """The number of devices that a round needs of those that are ready, at least one.

    Args:
        share: Above 0, at most 1.
        ready: How many there are, at least one.
    """
    return max(1, _tolerant_ceil(share * ready))


def asked_devices(count: int, over_selection: float, ready: int) -> int:
    """The number of devices that a round asks if it needs `count` of those that are ready."""
    return min(ready, _tolerant_ceil(count * (1 + over_selection)))


def _tolerant_ceil(value: float) -> int:
    """The value rounded up, except where only a floating-point error has put it above a whole number."""
    return math.ceil(value - 1e-9)
