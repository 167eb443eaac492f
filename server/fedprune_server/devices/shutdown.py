"""How long a server stays after its jobs are finished (`--until-finished`): until all devices know, or a limit has
passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

FLUSH_S = 10.0
"""Seconds that a broker may take for the last messages."""

LEAST_S = 1.5
"""Seconds after the end, and after a device has gone since: a broken connection is there again by then."""

MOST_S = 75.0
"""Seconds for which devices are waited for that were away as the job ended: their pauses between two attempts to
connect go up to a minute."""


class GracefulShutdown:
    """Waits, at the end of a job, for devices to be told.

    Connected devices are told at once, others as they announce themselves. One that ends with the job goes as soon as
    it was told; one that was away when the job ended (it was started again, or has just lost its connection) would wait
    for a server that has ended.
    """

    def __init__(self, there: Iterable[str], away: Iterable[str], here: Callable[[str], bool], now: float) -> None:
        self._here = here
        self._least, self._most = now + LEAST_S, now + MOST_S
        self._there, self._away = set(there), set(away)

    def over(self, now: float) -> bool:
        """Whether no device is left to wait for."""
        back = {n for n in self._away if self._here(n)}
        gone = {n for n in self._there if not self._here(n)}
        self._away -= back
        self._there = (self._there | back) - gone
        if gone:
            self._least = now + LEAST_S
        return now >= self._most or (now >= self._least and not self._away)
