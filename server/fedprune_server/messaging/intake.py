"""What a server's loop takes in: as many messages as a turn has time for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedprune_server.messaging.transport import Item, Unheard, Wire

TURN_S = 0.02
"""Messages are taken in for so long before what they led to is saved, in one transaction, and answered."""


class Intake:
    """The way from a connection to the loop.

    Args:
        link: The connection.
        clock: Seconds of a clock that nobody sets.

    Attributes:
        caught_up: When no message waited, lastly: whoever had not answered by then has not answered.
    """

    def __init__(self, link: Wire, clock: Callable[[], float]) -> None:
        self._link, self._clock = link, clock
        self.caught_up = 0.0

    def turn(self, pause_s: float) -> Iterator[Item]:
        """Wait for the first message; then all that have come, until none waits or the turn is over.

        Args:
            pause_s: For how long the first message is waited for.
        """
        return self._waiting(self._link.get(pause_s))

    def _waiting(self, item: Item | Unheard | None) -> Iterator[Item]:
        until = self._clock() + TURN_S
        while item is not None:
            if not isinstance(item, Unheard):
                yield item
            if self._clock() > until:
                return
            item = self._link.get()
        self.caught_up = self._clock()
