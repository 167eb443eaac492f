"""What is said of messages that don't count: enough to find out what is wrong, and not so much that it fills a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line

MOST = 20
"""Lines in a row; whoever sends more bad messages is heard of again an hour later."""

AGAIN_S = 3600.0


class RejectedMessageLog:
    """Logs bad messages, the first few of an hour one by one, and how many there were beside them.

    Args:
        log: Where to.
        clock: Seconds that only grow.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said = 0
        self._silent = 0
        self._since = clock()

    def about(self, topic: str, error: FedpruneError) -> None:
        """A message on a topic was ignored."""
        now = self._clock()
        if now - self._since >= AGAIN_S:
            if self._silent:
                self._log.warning("ignored %d more bad messages", self._silent)
            self._said, self._silent, self._since = 0, 0, now
        if self._said >= MOST:
            self._silent += 1
            return
        self._said += 1
        self._log.warning("ignored a message on %s: %s", one_line(topic, 200), one_line(str(error)))
        if self._said == MOST:
            self._log.warning("further bad messages are counted for an hour, and not shown")
