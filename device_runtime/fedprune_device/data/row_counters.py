"""Finds columns that count the rows of a table, such as the number of an entry in a database."""

from __future__ import annotations

import numpy as np

from fedprune_device.data.stored_array import Array, Rows

_MIN_ROWS = 10  # fewer may be measurements that happen to rise


class RowCounters:
    """Columns of `width` that rise, or fall, by one from each row to the next."""

    def __init__(self, width: int) -> None:
        self._is_rising, self._is_falling = np.ones(width, bool), np.ones(width, bool)
        self._last = np.zeros((0, width), np.float32)
        self._count = 0

    def add(self, rows: Array) -> None:
        """Add the next rows [n, width]; NaN is a missing number."""
        steps = np.diff(np.concatenate([self._last, rows]), axis=0)
        self._is_rising &= (steps == 1).all(axis=0)
        self._is_falling &= (steps == -1).all(axis=0)
        self._last = rows[-1:] if len(rows) else self._last
        self._count += len(rows)

    @property
    def positions(self) -> Rows:
        """The columns [n] that count; none of a table of a few rows."""
        return np.flatnonzero((self._is_rising | self._is_falling) & (self._count >= _MIN_ROWS))
