"""Rate-limited log of rejected messages: enough to find the reason without filling the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line

MOST = 20
"""Messages that are logged per period; the rest is counted."""

AGAIN_S = 3600.0


class RejectedMessageLog:
    """Logs the first `MOST` rejected messages of every hour, and how many followed them."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._logged = 0
        self._suppressed = 0
        self._since = clock()

    def about(self, topic: str, error: FedpruneError) -> None:
        """Record that a message on a topic was rejected."""
        now = self._clock()
        if now - self._since >= AGAIN_S:
            if self._suppressed:
                self._log.warning("ignored %d more bad messages", self._suppressed)
            self._logged, self._suppressed, self._since = 0, 0, now
        if self._logged >= MOST:
            self._suppressed += 1
            return
        self._logged += 1
        self._log.warning("ignored a message on %s: %s", one_line(topic, 200), one_line(str(error)))
        if self._logged == MOST:
            self._log.warning("further bad messages are counted for an hour, and not shown")
