"""The mean and deviation of a table's columns, from its rows in parts, leaving out numbers that are missing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedprune_device.data.stored_array import Array


class ColumnStatistics:
    """Mean and squared deviations of `width` columns, added up by parts (Chan, Golub and LeVeque 1983)."""

    def __init__(self, width: int) -> None:
        self._count = np.zeros(width)
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)

    def add(self, rows: Array) -> None:
        """Add rows [n, width]; NaN is a missing number."""
        is_there = ~np.isnan(rows)
        count = is_there.sum(axis=0)
        known = np.where(is_there, rows, 0).astype(np.float64, copy=False)
        mean = known.sum(axis=0) / np.maximum(count, 1)
        squares = (np.where(is_there, known - mean, 0) ** 2).sum(axis=0)
        total = np.maximum(self._count + count, 1)
        delta = mean - self._mean
        self._squares += squares + delta**2 * self._count * count / total
        self._mean += delta * count / total
        self._count += count

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """The means [width]; 0 of a column without any number."""
        return self._mean

    @property
    def deviation(self) -> npt.NDArray[np.float64]:
        """The deviations [width]: roots of the mean square."""
        return np.asarray(np.sqrt(self._squares / np.maximum(self._count, 1)))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How many numbers each column has [width]."""
        return self._count.astype(np.int64)
