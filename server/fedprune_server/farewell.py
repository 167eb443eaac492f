"""How long a server whose job is done stays: until every device has been told, as far as that can be known."""

from __future__ import annotations

from fedprune.coordination import State

LEAST_S = 1.5
"""Seconds after the end, and after a device has gone since: a broken connection is there again by then."""

MOST_S = 75.0
"""Seconds for which devices are waited for that were away as the job ended: their pauses between two attempts to
connect go up to a minute."""


class Farewell:
    """Watches who still has to be told.

    Devices that are there are told at once, others as they announce themselves. One that ends with the job goes as soon
    as it was told; one that was away when the job ended (it was started again, or has just lost its connection) would
    wait for a server that is no more.

    Args:
        state: The coordinator's state as the job is done.
        now: The time.
    """

    def __init__(self, state: State, now: float) -> None:
        self._state = state
        self._least, self._most = now + LEAST_S, now + MOST_S
        self._there = {n for n, d in state.devices.items() if d.online}
        self._away = {n for n, d in state.devices.items() if not d.online and not d.excluded}

    def over(self, now: float) -> bool:
        """Whether there is nobody left to wait for.

        Args:
            now: The time.
        """
        devices = self._state.devices
        back = {n for n in self._away if devices[n].online}
        gone = {n for n in self._there if not devices[n].online}
        self._away -= back
        self._there = (self._there | back) - gone
        if gone:
            self._least = now + LEAST_S
        return now >= self._most or (now >= self._least and not self._away)
