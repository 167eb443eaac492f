"""The line of a synchronous round's devices that wait for their turn, where only so many work at a time."""

from __future__ import annotations

from collections import deque

from fedprune.jobs.state import Progress, State


class Line:
    """Says whose turn is next. It is made from the state when it is first asked, and looks at each device a few times.

    Devices have their turns in the order of their names; whoever isn't there when its turn comes lets the others go
    first.

    Args:
        state: The coordinator's; read, never changed.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        names = sorted(n for n, t in state.tasks.items() if t.progress is Progress.QUEUED)
        self._here, self._away = deque(names), deque[str]()

    def next(self, count: int) -> list[str]:
        """The next devices; fewer where no more wait.

        Args:
            count: How many, at most.
        """
        found: list[str] = []
        while len(found) < count and (self._here or self._away):
            line = self._here or self._away
            name = line.popleft()
            task = self._state.tasks.get(name)
            if task is None or task.progress is not Progress.QUEUED:
                continue
            if line is self._here and not self._state.devices[name].online:
                self._away.append(name)
            else:
                found.append(name)
        return found
