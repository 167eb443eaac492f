"""Who of an asynchronous job's fleet is idle, at work, away or done, as its state says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedprune.coordination.state import Progress, State, Task

WORKING = (Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)
"""The device has something to do, or is about to get it."""


class Attendance:
    """Looks at the state, and never changes it.

    These questions are asked at every event: the answers don't sort a large fleet, nor look further than they must.

    Args:
        state: The coordinator's.
        may: Whether a device may be offered anything at all.
    """

    def __init__(self, state: State, may: Callable[[str], bool] = lambda name: True) -> None:
        self._state, self._may = state, may

    @property
    def busy(self) -> int:
        """How many devices work."""
        return self._state.tasks.count(*WORKING)

    @property
    def at_work(self) -> bool:
        """Whether something is awaited of anybody who is here: an update, or that it is checked."""
        return bool(self._state.tasks.count(*WORKING, Progress.STORED)) or any(True for _ in self.idle())

    @property
    def absent(self) -> bool:
        """Whether anybody is away who owes nothing."""
        tasks = self._state.tasks
        away = (n for n, d in self._state.devices.items() if not d.online and not d.excluded)
        return any(n not in tasks or tasks[n].progress is Progress.REFUSED for n in away)

    def idle(self) -> Iterator[str]:
        """Devices that may be offered something, in any order."""
        tasks = self._state.tasks
        for name, device in self._state.devices.items():
            if device.online and not device.excluded and self._may(name):
                task = tasks.get(name)
                if task is None or (task.progress is Progress.REFUSED and task.deadline is None):
                    yield name

    def done(self) -> list[tuple[str, Task]]:
        """Checked updates, in the order in which they came."""
        tasks = [(n, t) for n, t in self._state.tasks.items() if t.progress is Progress.FOLDED]
        return sorted(tasks, key=lambda pair: (pair[1].arrived_at or 0.0, pair[0]))
