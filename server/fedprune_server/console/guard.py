"""Who looks now and then whether something is so that an operator should know, with a console or without one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedprune.errors import FedpruneError, reason
from fedprune_server.console.alerts import AlertBook
from fedprune_server.console.surroundings import Members, ReleaseWatch
from fedprune_server.observation.onlooker import Onlooker
from fedprune_server.observation.view import JobView

log = logging.getLogger("fedprune.server")

SWEEP_S = 2.0
_COMPLAIN_S = 60.0


class Guard:
    """Writes into a book what is so, and what isn't any more.

    Args:
        book: The alerts.
        view: The first job, whose quarantine and connection are those of all.
        members: Who is let in; None for everybody.
        releases: What becomes of releases; None where none are given out.
    """

    def __init__(self, book: AlertBook, view: JobView, members: Members | None, releases: ReleaseWatch | None) -> None:
        self._book, self._view = book, view
        self._members, self._releases = members, releases

    def look(self, now: float) -> tuple[set[str], tuple[dict[str, Any], ...] | None]:
        """Look at what nobody tells of: a few rows each, never the fleet.

        Args:
            now: Seconds since 1970.

        Returns:
            Devices of which something has changed, and rollouts where those have.

        Raises:
            StorageError: The disk fails.
        """
        changed = self._quarantine(now)
        if self._view.connected():
            self._book.over("broker", now)
        else:
            self._book.raised("broker", "there is no connection to the broker", now)
        if self._members is not None:
            moved, waiting = self._members.look()
            changed |= moved
            for name in waiting:
                self._book.raised("waiting", f"{name} waits to be let in", now, device=name)
            self._book.only("waiting", waiting, now)
        rollouts = None if self._releases is None else self._releases.look()
        for row in (rollouts or ())[:1]:
            self._rollout(row, now)
        return changed, rollouts

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
        guard: Who looks.
        clock: Seconds since 1970.
        monotonic: Seconds of a clock that nobody sets.
    """

    def __init__(
        self, guard: Guard, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._guard = guard
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
        except (FedpruneError, OSError) as error:
            if now >= self._complain_at:
                self._complain_at = now + _COMPLAIN_S
                log.error("it can't be seen what operators should know: %s", reason(error))
