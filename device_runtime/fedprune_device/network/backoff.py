"""Exponential backoff: when to repeat a message that the server has not answered."""

from __future__ import annotations

from secrets import SystemRandom

# First and longest wait before an update is announced again; each wait is twice the last, ±25 %, so that boards of one
# round don't announce at the same moments.
MIN_ANNOUNCE_INTERVAL_S = 2.0
MAX_ANNOUNCE_INTERVAL_S = 60.0


class Backoff:
    """The times at which to repeat a message that the server has not answered: soon at first, then ever less often."""

    def __init__(self) -> None:
        self.next_at, self.count = 0.0, 0

    def restart(self, now: float) -> None:
        """Begin again: the next time is now."""
        self.next_at, self.count = now, 0

    def take_if_due(self, now: float) -> bool:
        """Whether it is time; then the next time is set."""
        if now < self.next_at:
            return False
        wait = min(MAX_ANNOUNCE_INTERVAL_S, MIN_ANNOUNCE_INTERVAL_S * 2.0 ** min(self.count, 10))
        self.count += 1
        self.next_at = now + wait * SystemRandom().uniform(0.75, 1.25)
        return True
