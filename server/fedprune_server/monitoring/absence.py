"""Boards that have not been connected for long, and since when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

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

    def _away(self) -> Iterator[str]:
        """Names of the boards, without a second collection of a large fleet's; some may come twice."""
        views = [v for v in self._views if not (v.state.paused or v.state.phase is Phase.FINISHED)]

        def here(name: str) -> bool:
            known = (view.state.devices.get(name) for view in views)
            return (self._present is not None and self._present(name)) or any(d and d.online for d in known)

        for view in views:
            revoked = view.revoked()
            yield from (name for name in view.state.devices if name not in revoked and not here(name))
