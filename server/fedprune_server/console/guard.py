"""Who looks now and then whether something is so that an operator should know, with a console or without one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedprune.errors import FedpruneError, reason
from fedprune_server.console.alerts import AlertBook
from fedprune_server.console.lookout import SWEEP_S, Lookout, Seen
from fedprune_server.observation.onlooker import Onlooker
from fedprune_server.observation.view import JobView

log = logging.getLogger("fedprune.server")

_COMPLAIN_S = 60.0


class Guard:
    """Writes into a book what is so, and what isn't any more.

    Args:
        book: The alerts.
        view: The first job, whose quarantine and connection are those of all.
    """

    def __init__(self, book: AlertBook, view: JobView) -> None:
        self._book, self._view = book, view

    def look(self, now: float) -> set[str]:
        """Look at what nobody tells of: a few rows each, never the fleet.

        Args:
            now: Seconds since 1970.

        Returns:
            Devices of which something has changed.
        """
        changed = self._quarantine(now)
        if self._view.connected():
            self._book.over("broker", now)
        else:
            self._book.raised("broker", "there is no connection to the broker", now)
        return changed

    def told(self, seen: Seen, now: float) -> None:
        """Write down what was found beside jobs.

        Args:
            seen: That.
            now: Seconds since 1970.
        """
        for name in seen.waiting:
            self._book.raised("waiting", f"{name} waits to be let in", now, device=name)
        self._book.only("waiting", seen.waiting, now)
        for row in (seen.rollouts or ())[:1]:
            self._rollout(row, now)

    def _quarantine(self, now: float) -> set[str]:
        held = self._view.quarantine.all_held()
        for name in held:
            found = self._view.quarantine.held(name)
            if found is not None:
                self._book.raised("quarantine", f"{name} isn't listened to: {found[1]}", now, device=name)
        before = {a.device for a in self._book.standing if a.alert == "quarantine" and a.device is not None}
        self._book.only("quarantine", held, now)
        return before | set(held)

    def _rollout(self, row: dict[str, Any], now: float) -> None:
        for kind, state in (("rollout", "stopped"), ("rollout_paused", "paused")):
            if row["state"] == state:
                self._book.raised(kind, f"{row['name']} {'is ' * (state == 'paused')}{row['why'] or state}", now)
            else:
                self._book.over(kind, now)


class LoneGuard(Onlooker):
    """Looks on for a server without a console, so that its figures have alerts all the same.

    Args:
        guard: Who looks at the job.
        lookout: Who looks beside it.
        clock: Seconds since 1970.
        monotonic: Seconds of a clock that nobody sets.
    """

    def __init__(
        self,
        guard: Guard,
        lookout: Lookout,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._guard, self._lookout = guard, lookout
        self._clock, self._monotonic = clock, monotonic
        self._next_at = self._complain_at = 0.0

    def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
        """Look, if it is time; what fails here costs the job nothing."""
        now = self._monotonic()
        if now < self._next_at:
            return
        self._next_at = now + SWEEP_S
        try:
            self._guard.look(self._clock())
            if (found := self._lookout.seen()) is not None:
                self._guard.told(found, self._clock())
        except (FedpruneError, OSError) as error:
            if now >= self._complain_at:
                self._complain_at = now + _COMPLAIN_S
                log.error("it can't be seen what operators should know: %s", reason(error))
