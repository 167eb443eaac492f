"""A log of rejected messages, with a limit for each sender, so that no board can fill it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line

# Rejected messages of one sender that are logged per hour; the rest is counted, so that no board can fill the log.
MAX_LOGGED = 20


LOG_PERIOD_S = 3600.0


class RejectedMessageLog:
    """Logs the first `MAX_LOGGED` rejected messages of each sender in every hour, and how many followed them.

    One board that sends nothing but nonsense, such as the copy of another one's card, must not hide what is wrong with
    the others. Senders that the caller doesn't know share one limit: anybody can invent names.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._since = clock()

    def note_rejection(self, topic: str, error: FedpruneError, sender: str = "") -> None:
        """Log or count a rejected message; `sender` is the device, if it belongs to the fleet, and otherwise empty."""
        now = self._clock()
        if now - self._since >= LOG_PERIOD_S:
            for name, count in sorted(self._counts.items()):
                if count > MAX_LOGGED:
                    self._log.warning(
                        "ignored %d more bad messages%s", count - MAX_LOGGED, f" on topics of {name}" if name else ""
                    )
            self._counts.clear()
            self._since = now
        self._counts[sender] += 1
        if self._counts[sender] > MAX_LOGGED:
            return
        self._log.warning("ignored a message on %s: %s", one_line(topic, 200), one_line(str(error)))
        if self._counts[sender] == MAX_LOGGED:
            of_sender = f" on topics of {sender}" if sender else ""
            self._log.warning("further bad messages%s are counted for an hour, and not shown", of_sender)
