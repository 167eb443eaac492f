"""Boards that have not been connected for long, and since when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedprune.coordination import Phase
from fedprune_server.monitoring.view import JobView

_LOOK_S = 60.0
"""Between two looks, each of which reads all boards."""


class Absences:
    """Watches the boards of all jobs that are neither paused nor finished. Times are in seconds since 1970.

    Args:
        limit_s: Seconds after which a board has been away for long; 0 watches none.
        present: Whether a board is connected, at whatever job; None to go by the jobs alone.
        known: Since when boards are away that were so when the last run ended.
    """

    def __init__(
        self,
        views: Sequence[JobView],
        limit_s: float,
        present: Callable[[str], bool] | None,
        known: Mapping[str, float],
    ) -> None:
        self._views, self._limit_s, self._present = views, limit_s, present
        self._since = dict(known)
        self._long: Mapping[str, float] = {}
        self._look_at = 0.0

    def look(self, now: float) -> Mapping[str, float]:
        """Boards that have been away for long, and since when; the longest first."""
        if self._limit_s and not 0.0 <= self._look_at - now <= _LOOK_S:
            self._look_at = now + _LOOK_S
            self._since = {name: self._since.get(name, now) for name in self._away()}
            long = [(since, name) for name, since in self._since.items() if now - since >= self._limit_s]
            self._long = {name: since for since, name in sorted(long)}
        return self._long

    def _away(self) -> set[str]:
        away, here = set[str](), set[str]()
        for view in self._views:
            if view.state.paused or view.state.phase is Phase.FINISHED:
                continue
            revoked = view.revoked()
            for name, device in view.state.devices.items():
                if device.online or (self._present is not None and self._present(name)):
                    here.add(name)
                elif name not in revoked:
                    away.add(name)
        return away - here
