"""How a board stands, for whoever asks it: what it is at, what went wrong last, how good its model is."""

from __future__ import annotations

from typing import Any

from fedprune.core.metrics import served
from fedprune.wire.messages import Update
from fedprune.wire.offer import Offer


class BoardStatus:
    """Notes that one thread writes and others read. Each is replaced as a whole."""

    def __init__(self) -> None:
        self.connected = False
        self._work: dict[str, Any] = {
            "job": None,
            "round": None,
            "phase": "idle",
            "done": 0,
            "total": 0,
            "alone": False,
        }
        self._error: dict[str, Any] | None = None
        self._measured: dict[str, float | None] = {"accuracy": None, "loss": None}

    def working(self, offer: Offer, status: tuple[str, int, int], *, alone: bool = False) -> None:
        """It is at an offer: phase, units done, units in all; or trains on from one while the server is away."""
        self._at(offer, *status, alone=alone)

    def announcing(self, update: Update) -> None:
        """An update waits to be handed in."""
        self._at(update, "announce")
        self._measured = {kind: served(update.metrics, kind) for kind in ("accuracy", "loss")}

    def idle(self) -> None:
        """Nothing is to be done; job and round are the last ones."""
        if self._work["phase"] != "idle":
            self._work = {**self._work, "phase": "idle", "done": 0, "total": 0, "alone": False}

    def failed(self, offer: Offer, reason: str) -> None:
        """An offer isn't carried out."""
        self._error = {"job": offer.job, "round": offer.round, "reason": reason[:500]}

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"connected": self.connected, **self._work, "last_error": self._error, **self._measured}

    def _at(self, what: Offer | Update, phase: str, done: int = 0, total: int = 0, *, alone: bool = False) -> None:
        counted = {"phase": phase, "done": done, "total": total}
        self._work = {"job": what.job, "round": what.round, **counted, "alone": alone}
