"""Times at which a coordinator wants to be called."""

from __future__ import annotations

import heapq


class Alarms:
    """Deadlines, the next one first."""

    def __init__(self) -> None:
        self._at: list[float] = []

    @property
    def next(self) -> float | None:
        """When the next one is, in seconds since 1970; None if there is none."""
        return self._at[0] if self._at else None

    def add(self, at: float) -> None:
        """One more."""
        heapq.heappush(self._at, at)

    def rung(self, now: float) -> bool:
        """Whether one is over; those that are, are taken off."""
        over = False
        while self._at and self._at[0] <= now:
            heapq.heappop(self._at)
            over = True
        return over
