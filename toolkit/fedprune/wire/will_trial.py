"""Finds out whether a broker accepts connections with a will: some refuse them, or just hang up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

AGAIN_S = 24 * 3600.0
"""Time after which the will is tried again with a broker that refused it."""

_BAD_CREDENTIALS, _NOT_AUTHORIZED = 134, 135
"""Return codes 4 and 5 of MQTT 3.1.1, as paho numbers them."""

_ENOUGH = 2
"""Score at which the will is suspected: one refusal for any reason but the client's identity, or two silent
failures."""


class WillTrial:
    """Decides for each connection whether it has a will, by the outcome of the earlier ones.

    After a refusal the next connection has none. If the broker accepts that, it gets no will for a day; if not, the
    will was not the reason. A wrong password never is one; `not authorized` is one the second time, because some
    brokers mean the will's topic by it. A broker that didn't answer may just have been slow or starting: once it
    accepts a connection without a will, the will is tried once more, and only that outcome counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._with = True
        self._answered = False
        self._doubtful = False  # only silence suggests that the will is the reason
        self._again = False
        self._at_once = False
        self._without_since: float | None = None

    @property
    def pending(self) -> bool:
        """Whether it is still open if the last connection failed because of the will."""
        return self._failures > 0

    @property
    def at_once(self) -> bool:
        """Whether the next connection is the second try with the will, which needs no pause: the broker is running."""
        return self._at_once

    def begin(self) -> bool:
        """Begin a connection; returns whether it has a will."""
        if self._without_since is not None and self._clock() - self._without_since >= AGAIN_S:
            self._without_since = None
        self._answered, self._at_once = False, False  # a broker that can't be reached gets a pause again
        self._with = self._without_since is None and (self._failures < _ENOUGH or self._again)
        return self._with

    def accepted(self) -> bool:
        """The broker accepts the connection; returns whether to keep it or to try the will once more at once."""
        self._answered = True
        if not self._with and self._without_since is None and self._doubtful:
            self._doubtful, self._again, self._at_once = False, True, True
            return False
        self._failures, self._doubtful, self._again = 0, False, False
        if not self._with and self._without_since is None:
            self._without_since = self._clock()
            log.warning(
                "the MQTT broker takes no connection with a will: connected without one. Should this board vanish, its "
                "server finds out by silence, which takes longer"
            )
        return True

    def refused(self, code: int) -> None:
        """The broker refuses the connection for a reason, by its number in MQTT 5."""
        self._answered = True
        self._doubtful = False
        self._failed(0 if code == _BAD_CREDENTIALS else 1 if code == _NOT_AUTHORIZED else _ENOUGH)

    def ended(self) -> None:
        """The connection has ended; without an answer it has failed."""
        if not self._answered:
            self._answered = True
            self._doubtful = self._with and not self._again and (self._doubtful or not self._failures)
            self._failed(1)

    def _failed(self, weight: int) -> None:
        again, self._again = self._again, False
        if self._with and weight:
            self._failures = _ENOUGH if again else min(_ENOUGH, self._failures + weight)
        else:
            self._failures, self._without_since, self._doubtful = 0, None, False
