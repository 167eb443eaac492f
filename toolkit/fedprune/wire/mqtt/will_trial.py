"""Whether a broker takes connections with a will, as found out by trying: some refuse them, or just hang up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

AGAIN_S = 24 * 3600.0
"""A connection that begins so long after the will was found to be the trouble is tried with one again."""

_BAD_CREDENTIALS, _NOT_AUTHORIZED = 134, 135
"""Return codes 4 and 5 of MQTT 3.1.1, as paho numbers them."""

_ENOUGH = 2
"""A refusal that names another reason than who connects is enough, and so are two connections that got no answer."""


class WillTrial:
    """Says of each connection whether it has a will, by what became of those before.

    A broker that refuses a connection with a will is asked once without. If it takes that, it is not troubled with a
    will for a day; if it doesn't, the will was not the reason. A wrong password never is a reason; `not authorized` is
    one the second time, because some brokers mean the will's topic by it. A broker that didn't answer may just have
    been slow, or starting: once it takes a connection without, that one is given up for another try with the will, and
    only what it does then is believed.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._with = True
        self._answered = False
        self._doubtful = False  # nothing but silence speaks against the will
        self._again = False
        self._at_once = False
        self._without_since: float | None = None

    @property
    def pending(self) -> bool:
        """Whether the will may be why the last connection failed, which is still to be found out."""
        return self._failures > 0

    @property
    def at_once(self) -> bool:
        """Whether the next connection is that other try: the broker is there, and needn't be given time."""
        return self._at_once

    def begin(self) -> bool:
        """A connection begins; whether it has a will."""
        if self._without_since is not None and self._clock() - self._without_since >= AGAIN_S:
            self._without_since = None
        self._answered, self._at_once = False, False  # if it can't even be reached, the broker is given time again
        self._with = self._without_since is None and (self._failures < _ENOUGH or self._again)
        return self._with

    def accepted(self) -> bool:
        """The broker takes the connection.

        Returns:
            Whether to keep it; else the next one, with the will, is to be tried at once.
        """
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
        """The broker refuses the connection.

        Args:
            code: The reason, as a number of MQTT 5.
        """
        self._answered = True
        self._doubtful = False
        self._failed(0 if code == _BAD_CREDENTIALS else 1 if code == _NOT_AUTHORIZED else _ENOUGH)

    def ended(self) -> None:
        """The connection is over; one that got no answer has failed."""
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
