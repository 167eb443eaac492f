"""Seconds since 1970 that pass evenly, even if the system's clock is set meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable


class SteadyClock:
    """The system's time at one moment, plus the seconds that a monotonic clock has counted since.

    Deadlines are kept as times since 1970, so that they mean something after a restart. With the system's clock itself,
    setting it by an hour would close a round at once, or keep it open for an hour.
    """

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self._offset + self._monotonic()

    def follow(self) -> float:
        """Adopt the system clock's present time; returns by how many seconds pending deadlines must move, too."""
        former, self._offset = self._offset, self._wall() - self._monotonic()
        return self._offset - former
