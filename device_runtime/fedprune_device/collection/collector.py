"""Hands the samples of a live source to the board at a limited rate, and counts what becomes of them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune.model.lengths import Shape
from fedprune_device.client import Board, BoardError

_LOG = logging.getLogger("fedprune.device")

_AGAIN_S = 60.0  # between two lines about problems
_ASK_S = 5.0  # between two questions for the model's input

TAKES_NONE, UNFIT = 409, (400, 409, 413, 415, 422)
"""Statuses of a board that takes no samples, and of a sample or label that the board doesn't take."""


class Collector:
    """The one way from a live source to the board. `every` are the seconds between two samples; `clock` is monotonic.

    A sample that the board can't take is counted and dropped, so that nothing piles up.
    """

    def __init__(self, board: Board, every: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = Counter[str]()
        self._board, self._every, self._clock = board, every, clock
        self._due = self._ask_at = self._log_at = clock()
        self._input: Shape | None = None
        self._unlogged = 0

    @property
    def due(self) -> bool:
        """Whether a sample would be stored now."""
        return self._clock() >= self._due

    def input(self) -> Shape | None:
        """The shape of a sample, as the board's model takes it; None while that is unknown."""
        if self._input is None and self._clock() >= self._ask_at:
            self._ask_at = self._clock() + _ASK_S
            try:
                found = self._board.status().get("input")
                self._input = None if found is None else tuple(found)
            except BoardError as error:
                self.problem("not stored", error)
        return self._input

    def add(self, x: Any, label: int | str | None = None) -> str | None:
        """Hand in a sample if one is due; returns its id if the board keeps it.

        Raises `ConfigError` if the board takes no samples at all.
        """
        if not self.due:
            self.counts["passed over"] += 1
            return None
        self._due = self._clock() + self._every
        try:
            added = self._board.add(x, label)
        except BoardError as error:
            if error.status == TAKES_NONE and label is None:
                raise ConfigError(str(error)) from error
            self._input = None  # another model may have other inputs
            self.problem("left out" if error.status in UNFIT else "not stored", error)
            return None
        self.counts["known" if added["duplicate"] else "kept" if added["kept"] else "not kept"] += 1
        return str(added["id"]) if added["kept"] else None

    def label(self, sample: str, label: int | str) -> None:
        """Label a stored sample."""
        try:
            self._board.label(sample, label)
            self.counts["labelled"] += 1
        except BoardError as error:
            self.problem("label left out", error)

    def problem(self, kind: str, error: object, count: int = 1) -> None:
        """Count what is left out, and log the first and then at most one a minute."""
        self.counts[kind] += count
        self._unlogged += count
        if (now := self._clock()) >= self._log_at:
            more = f" ({self._unlogged} such since the last line)" if self._unlogged > 1 else ""
            _LOG.warning("%s: %s%s", kind, error, more)
            self._log_at, self._unlogged = now + _AGAIN_S, 0

    @property
    def summary(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in sorted(self.counts.items())) or "no samples"
