"""Finds the usual time of a job's recent rounds, from the ends of rounds that an observer sees."""

from __future__ import annotations

from collections import deque
from statistics import median

# Enough that seven rounds that stall change nothing, and few enough to follow a fleet that becomes slower.
_RECENT_ROUNDS = 15


class RoundTimes:
    """Seconds from the end of each round to the next one's."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT_ROUNDS)

    def note_end(self, number: int, now: float) -> None:
        """Note the end of a round. The first one gives no time, because its beginning wasn't seen."""
        if self._last is not None and number > self._last[0] and now >= self._last[1]:  # unless a clock was set back
            self._seconds.append((now - self._last[1]) / (number - self._last[0]))
        self._last = number, now

    def usual_s(self) -> float | None:
        """Seconds of a usual round; None before two have ended.

        The median, because one round that waits for its deadline takes as long as hundreds of others.
        """
        return median(self._seconds) if self._seconds else None
