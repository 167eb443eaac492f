"""What a board works on now, as its local interface shows it: connection, job, round, progress, last error."""

from __future__ import annotations

from typing import Any

from fedprune.core.metrics import BLEND, served_metrics
from fedprune.wire.messages import Offer, UpdateAnnouncement

_IDLE = {"phase": "idle", "done": 0, "total": 0, "alone": False}


class BoardStatus:
    """One thread writes the status and others read it: its dictionaries are replaced, never changed."""

    def __init__(self) -> None:
        self.connected = False
        self._work: dict[str, Any] = {"job": None, "round": None, **_IDLE}
        self._error: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}

    def set_working(self, offer: Offer, status: tuple[str, int, int], *, alone: bool = False) -> None:
        """Show a phase of an offer's work, as (phase, units done, units in all); `alone`: training without a server."""
        self._set_work(offer, *status, alone=alone)

    def set_announcing(self, update: UpdateAnnouncement) -> None:
        self._set_work(update, "announce")
        blend_share = {n: v for n, v in update.metrics.items() if n == BLEND}
        self._metrics = served_metrics(update.metrics) | blend_share

    def set_idle(self) -> None:
        if self._work["phase"] != "idle":
            self._work = {**self._work, **_IDLE}

    def set_failure(self, offer: Offer, reason: str) -> None:
        self._error = {"job": offer.job, "round": offer.round, "reason": reason[:500]}

    def to_dict(self) -> dict[str, Any]:
        return {"connected": self.connected, **self._work, "last_error": self._error, "metrics": self._metrics}

    def _set_work(
        self, message: Offer | UpdateAnnouncement, phase: str, done: int = 0, total: int = 0, *, alone: bool = False
    ) -> None:
        progress = {"phase": phase, "done": done, "total": total}
        self._work = {"job": message.job, "round": message.round, **progress, "alone": alone}
