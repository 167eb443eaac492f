"""How many devices a synchronous round asks, and the stragglers (slow devices) that it stops waiting for.

With `over_selection` a round asks more devices than it needs, and stops waiting for the slowest when enough updates are
in. To avoid dropping the same devices each time, a round waits for a device that was dropped in `MAX_MISSED_ROUNDS`
rounds in a row, up to the deadline.
"""

from __future__ import annotations

import math
from collections import Counter

from fedprune.coordination.availability import NumberQueue
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import DeviceTask, Progress, State

# Rounds in a row in which a device may be dropped; the round after them waits for it.
MAX_MISSED_ROUNDS = 3

ENOUGH_UPDATES = "enough updates are in"

# How often the coordinator looks for late devices within a deadline's time, where each has a deadline of its own.
LOOKS_PER_DEADLINE = 20

DEADLINE_PASSED = "the deadline has passed"

# The device has not been offered its part yet.
BEFORE_OFFER = (Progress.QUEUED, Progress.EXTRACTING)

# The device has its offer, and its update isn't here.
_AWAITED = (Progress.OFFERED, Progress.PULLING)


class Stragglers:
    """Finds the devices that a round no longer waits for, from the job's state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._changed = state.tasks.watch()
        self._waited_for = set[str]()
        self._moved, self._deadlines = state.tasks.watch(), NumberQueue()

    def late_tasks(self, now: float) -> list[tuple[str, DeviceTask]]:
        """Parts of devices whose deadline has passed."""
        return [
            (name, task)
            for name, task in sorted(self._state.tasks.items())
            if task.progress in _AWAITED and task.deadline is not None and task.deadline <= now
        ]

    def latest_deadline(self) -> float | None:
        """The latest deadline of a part that is under way; only changed parts are looked at."""
        for name in self._moved:
            task = self._state.tasks.get(name)
            is_awaited = task is not None and task.progress in _AWAITED
            self._deadlines.put(name, -task.deadline if task is not None and is_awaited and task.deadline else None)
        self._moved.clear()
        return next((-self._deadlines.numbers[name] for name in self._deadlines.first(1)), None)

    def unneeded_tasks(self, counts: Counter[Progress]) -> list[tuple[str, DeviceTask]]:
        """The parts that a round needs no longer, as enough updates are in; `counts` are the parts by progress.

        Every part is needed while an update is on the disk but not checked, or while the round waits for a device that
        was dropped too often.
        """
        target = self._state.target_updates
        if not target or counts[Progress.FOLDED] < target or counts[Progress.STORED] or self._waits_for_missed_device():
            return []
        return [(n, t) for n, t in sorted(self._state.tasks.items()) if not t.progress.is_over]

    def _waits_for_missed_device(self) -> bool:
        """Whether the round waits for a device that was dropped too often; only changed parts are looked at."""
        for name in self._changed:
            task = self._state.tasks.get(name)
            is_open = task is not None and not task.progress.is_over
            is_waited_for = is_open and self._state.devices[name].missed_rounds >= MAX_MISSED_ROUNDS
            (self._waited_for.add if is_waited_for else self._waited_for.discard)(name)
        self._changed.clear()
        return bool(self._waited_for)

    def stop_waiting(self, name: str, task: DeviceTask, reason: str) -> None:
        """Stop waiting for a device. This is no failure of it, but the rounds in a row that dropped it are counted."""
        device = self._state.devices[name]
        if reason != ENOUGH_UPDATES:
            device.missed_rounds = 0  # it had the whole time until its deadline
        elif device.online and task.progress not in BEFORE_OFFER:
            device.missed_rounds += 1
        task.refuse(reason, FailureKind.LATE)


def needed_devices(share: float, ready: int) -> int:
    """The number of devices that a round needs: a share (above 0, at most 1) of those that are ready, at least one."""
    return max(1, _tolerant_ceil(share * ready))


def asked_devices(count: int, over_selection: float, ready: int) -> int:
    """The number of devices that a round asks if it needs `count` of those that are ready."""
    return min(ready, _tolerant_ceil(count * (1 + over_selection)))


def _tolerant_ceil(value: float) -> int:
    """The value rounded up, except where only a floating-point error has put it above a whole number."""
    return math.ceil(value - 1e-9)
