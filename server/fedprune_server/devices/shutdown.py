"""The time for which a server stays after its jobs (`--until-finished`): until all know it, or a limit has passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

# Seconds that a broker may take for the last messages.
FLUSH_S = 10.0

# Minimum seconds after the jobs' end, and after a device has disconnected since: within them a device whose connection
# broke just then is connected again and learns of the end.
MIN_WAIT_S = 1.5

# Maximum seconds after the jobs' end, for devices that were away: their pauses between two attempts to connect grow up
# to a minute.
MAX_WAIT_S = 75.0


class GracefulShutdown:
    """Waits, at the end of a server's jobs, until its devices know of it.

    Connected (`present`) devices are informed at once, others as they announce themselves. A device that ends with the
    job disconnects as soon as it knows. One that was away at the job's end (it was started again, or has just lost its
    connection) would otherwise wait for a server that has ended: `absent` devices may come back. Times are of the
    monotonic clock."""

    def __init__(
        self, present: Iterable[str], absent: Iterable[str], is_connected: Callable[[str], bool], now: float
    ) -> None:
        self._is_connected = is_connected
        self._earliest_end, self._latest_end = now + MIN_WAIT_S, now + MAX_WAIT_S
        self._present, self._absent = set(present), set(absent)

    def is_over(self, now: float) -> bool:
        """Whether no device is left to wait for."""
        returned = {n for n in self._absent if self._is_connected(n)}
        vanished = {n for n in self._present if not self._is_connected(n)}
        self._absent -= returned
        self._present = (self._present | returned) - vanished
        if vanished:
            self._earliest_end = now + MIN_WAIT_S
        return now >= self._latest_end or (now >= self._earliest_end and not self._absent)
