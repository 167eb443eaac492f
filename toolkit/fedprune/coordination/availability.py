"""Indexes of an asynchronous job's state: which devices are idle, at work, away or done, and which deadline is next.

An event concerns one device. The indexes are brought up to date by what has changed since they were last asked, so that
the work of a round grows with the fleet and not with its square.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedprune.jobs.state import Progress, State, Task

WORKING = (Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)
"""The device has something to do, or is about to get it."""

Turn = tuple[float, str]


@dataclass(frozen=True)
class _Entry:
    """Where one device is listed; None where it is not."""

    idle: Turn | None
    arrival: float | None
    deadline: tuple[float, str] | None
    away: bool


class Availability:
    """Reads the state, and never changes it.

    Args:
        may: Whether a device may be offered anything at all, by its entry in the state.
        turn: A device's place in the present round's queue for offers; by default by name.
    """

    def __init__(
        self, state: State, may: Callable[[str], bool] = lambda name: True, turn: Callable[[str], Turn] | None = None
    ) -> None:
        self._state, self._may, self._turn = state, may, turn
        self._changed = (state.devices.watch(), state.tasks.watch())
        self._round = state.round
        self._entries: dict[str, _Entry] = {}
        self._idle: list[Turn] = []
        self._arrivals: list[float] = []
        self._deadlines: list[tuple[float, str]] = []
        self._away = 0

    @property
    def busy(self) -> int:
        """How many devices work."""
        return self._state.tasks.count(*WORKING)

    @property
    def at_work(self) -> bool:
        """Whether an update, or its check, is awaited of any device that is connected."""
        return bool(self._state.tasks.count(*WORKING, Progress.STORED)) or self.idle > 0

    @property
    def absent(self) -> bool:
        """Whether a device is away that has no part to finish."""
        self._refresh()
        return self._away > 0

    @property
    def idle(self) -> int:
        """How many devices may be offered something."""
        self._refresh()
        return len(self._idle)

    @property
    def arrivals(self) -> list[float]:
        """When the checked updates came, sorted."""
        self._refresh()
        return self._arrivals

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of any part."""
        self._refresh()
        return self._deadlines[0][0] if self._deadlines else None

    def first(self, most: int) -> list[str]:
        """Names of idle devices, sorted; where there are more than `most`, those whose turn comes first."""
        self._refresh()
        return sorted(name for _, name in self._idle[:most])

    def late(self, now: float) -> list[str]:
        """Names of devices whose deadline has passed, sorted."""
        self._refresh()
        end = bisect_right(self._deadlines, now, key=lambda pair: pair[0])
        return sorted(name for _, name in self._deadlines[:end])

    def done(self) -> list[tuple[str, Task]]:
        """Checked updates, in the order in which they came."""
        tasks = [(n, t) for n, t in self._state.tasks.items() if t.progress is Progress.FOLDED]
        return sorted(tasks, key=lambda pair: (pair[1].arrived_at or 0.0, pair[0]))

    def _refresh(self) -> None:
        names = set().union(*self._changed)
        for changed in self._changed:
            changed.clear()
        if self._turn is not None and self._round != self._state.round:
            names |= {name for _, name in self._idle}  # each round draws its queue again
        self._round = self._state.round
        for name in names:
            before = self._entries.pop(name, None)
            if before is not None:
                self._unlist(before)
            self._list(name)

    def _list(self, name: str) -> None:
        device, task = self._state.devices.get(name), self._state.tasks.get(name)
        idle = away = False
        if device is not None and not device.excluded:
            refused = task is not None and task.progress is Progress.REFUSED
            away = not device.online and (task is None or refused)
            idle = device.online and (task is None or (refused and task.deadline is None)) and self._may(name)
        if device is None and task is None:
            return
        done = task is not None and task.progress is Progress.FOLDED
        due = None if task is None else task.deadline
        entry = self._entries[name] = _Entry(
            ((0.0, name) if self._turn is None else self._turn(name)) if idle else None,
            (task.arrived_at or 0.0) if task is not None and done else None,
            None if due is None else (due, name),
            away,
        )
        for found, value in self._places(entry):
            insort(found, value)
        self._away += away

    def _unlist(self, entry: _Entry) -> None:
        for found, value in self._places(entry):
            del found[bisect_left(found, value)]
        self._away -= entry.away

    def _places(self, entry: _Entry) -> list[tuple[list[Any], Any]]:
        lists = (self._idle, entry.idle), (self._arrivals, entry.arrival), (self._deadlines, entry.deadline)
        return [(found, value) for found, value in lists if value is not None]
