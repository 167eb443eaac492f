"""Indexes of an asynchronous job's state: which devices are idle, at work, away or done, and which deadline is next.

An event concerns one device. The indexes are brought up to date by what has changed since they were last asked, so that
the work of an event doesn't grow with the fleet.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from fedprune.jobs.state import DeviceTask, Progress, State

# The device has something to do, or is about to get it.
WORKING_PROGRESS = (Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)


class NumberQueue:
    """Names in the order of a number that each has.

    It is a heap. A pair whose name has another number by now, or none, is dropped when it comes to the front: to find
    it earlier would mean to look at all of them.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def put(self, name: str, number: float | None) -> None:
        """Give a name a number; None takes it out."""
        if number is None:
            self.numbers.pop(name, None)
        elif self.numbers.get(name) != number:
            self.numbers[name] = number
            heappush(self._heap, (number, name))
            # Outdated pairs may outnumber the others by as much before the heap is made anew, which then costs little
            # per change.
            if len(self._heap) > 2 * len(self.numbers) + 100:
                self._heap = [(n, name) for name, n in self.numbers.items()]
                heapify(self._heap)

    def first(self, count: float = math.inf, until: float = math.inf) -> list[str]:
        """The names with the smallest numbers: at most `count` of them, with numbers up to `until`."""
        pairs: list[tuple[float, str]] = []
        while self._heap and len(pairs) < count and self._heap[0][0] <= until:
            pair = heappop(self._heap)
            if self.numbers.get(pair[1]) == pair[0] and pair not in pairs[-1:]:
                pairs.append(pair)
        # What was read stays in the queue: `put` alone takes names out.
        for pair in pairs:
            heappush(self._heap, pair)
        return [name for _, name in pairs]


class DeviceIndex:
    """Sets of devices by what they do. It reads the state, and never changes it.

    Args:
        may_be_offered: Whether a device may be offered anything at all, by its entry in the state.
        queue_number: Orders devices in the queue for offers; by default they are in the order of their names. It may
            change only with the device's entry in the state.
    """

    def __init__(
        self, state: State, may_be_offered: Callable[[str], bool], queue_number: Callable[[str], float] | None = None
    ) -> None:
        self._state, self._may_be_offered, self._queue_number = state, may_be_offered, queue_number
        self._changed = (state.devices.watch(), state.tasks.watch())
        self._idle_queue, self._deadline_queue = NumberQueue(), NumberQueue()
        self._arrival_of_device: dict[str, float] = {}
        self._sorted_arrivals: list[float] = []
        self._absent_devices, self._unchecked_devices, self._failed_devices = set[str](), set[str](), set[str]()

    @property
    def may_bring_update(self) -> bool:
        """Whether any device may still bring an update: it works or is idle, or its update isn't checked yet."""
        return bool(self._state.tasks.count(*WORKING_PROGRESS, Progress.STORED)) or self.idle_count > 0

    @property
    def has_absent_device(self) -> bool:
        """Whether a device is away that has no part to finish."""
        self._refresh()
        return bool(self._absent_devices)

    @property
    def idle_count(self) -> int:
        """How many devices may be offered something."""
        self._refresh()
        return len(self._idle_queue.numbers)

    @property
    def arrival_times(self) -> list[float]:
        """When the checked updates came, sorted."""
        self._refresh()
        return self._sorted_arrivals

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of any part."""
        self._refresh()
        return next((self._deadline_queue.numbers[n] for n in self._deadline_queue.first(1)), None)

    def first_idle(self, count: int) -> list[str]:
        """Names of idle devices, sorted; where there are more than `count`, those whose turn comes first."""
        self._refresh()
        return sorted(self._idle_queue.first(count))

    def late_devices(self, now: float) -> list[str]:
        """Names of devices whose deadline has passed, sorted."""
        self._refresh()
        return sorted(self._deadline_queue.first(until=now))

    def checked_updates(self) -> list[tuple[str, DeviceTask]]:
        """Checked updates, in the order in which they came."""
        self._refresh()
        return [(n, self._state.tasks[n]) for _, n in sorted((at, n) for n, at in self._arrival_of_device.items())]

    def unchecked_updates(self) -> list[tuple[str, DeviceTask]]:
        """Updates that are not checked yet, by name."""
        self._refresh()
        return [(n, self._state.tasks[n]) for n in sorted(self._unchecked_devices)]

    def failed_devices(self) -> set[str]:
        """Names of devices whose part has failed."""
        self._refresh()
        return set(self._failed_devices)

    def _refresh(self) -> None:
        names = set().union(*self._changed)
        for changed in self._changed:
            changed.clear()
        for name in names:
            self._list_device(name)

    def _list_device(self, name: str) -> None:
        device, task = self._state.devices.get(name), self._state.tasks.get(name)
        progress = None if task is None else task.progress
        is_idle = is_away = False
        if device is not None and not device.excluded:
            # A device that refused waits for its deadline; without one it may be asked at once.
            is_waiting = task is not None and task.deadline is not None
            is_away = not device.online and progress in (None, Progress.REFUSED)
            is_idle = (
                device.online
                and device.silent_since is None
                and progress in (None, Progress.REFUSED)
                and not is_waiting
                and self._may_be_offered(name)
            )
        turn = 0.0 if self._queue_number is None or not is_idle else self._queue_number(name)
        self._idle_queue.put(name, turn if is_idle else None)
        self._deadline_queue.put(name, None if task is None else task.deadline)
        if name in self._arrival_of_device:
            del self._sorted_arrivals[bisect_left(self._sorted_arrivals, self._arrival_of_device.pop(name))]
        if task is not None and progress is Progress.FOLDED:
            self._arrival_of_device[name] = task.arrived_at or 0.0
            insort(self._sorted_arrivals, self._arrival_of_device[name])
        memberships = (
            (self._absent_devices, is_away),
            (self._unchecked_devices, progress is Progress.STORED),
            (self._failed_devices, progress is Progress.REFUSED),
        )
        for names, is_member in memberships:
            (names.add if is_member else names.discard)(name)
