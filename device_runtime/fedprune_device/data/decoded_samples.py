"""Caches decoded files on the disk, in the size that a model takes, for as long as the process lives."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import DataError, shape_text
from fedprune_device.data.stored_array import Array, OpenFiles, StoredArray


class CacheFullError(DataError):
    """The cache of decoded samples is full."""


class DecodedSamples:
    """A temporary file without a name, with at most `max_bytes` of samples, each followed by its label.

    It is in `folder`, or in the system's temporary folder if that is None.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: dict[str, range] = {}
        self._count = 0
        self._x = self._y = np.zeros(0, np.uint8)
        with storage_errors("can't make a file for decoded samples"):
            self._file = OpenFiles.in_folder(folder)

    def is_worth_keeping(self, names: Collection[str]) -> bool:
        """Whether at most half of the cached files are others than these, and the missing ones fit."""
        useless_files = sum(name not in names for name in self._rows)
        missing_files = sum(name not in self._rows for name in names)
        samples_per_file = self._count / max(1, len(self._rows))
        fits = (self._count + missing_files * samples_per_file) * self._record_bytes <= self._max_bytes
        return 2 * useless_files <= len(self._rows) and (fits or not useless_files)

    def rows_for(self, name: str, decode: Callable[[], tuple[Array, Array]]) -> range:
        """The rows of a file's samples; for a new file `decode` returns its samples [k, ...] and labels [k, ...].

        Raises `CacheFullError`, or `DataError` if type or shape of its samples differ from those of earlier files.
        """
        if name in self._rows:
            return self._rows[name]
        if self._count and (self._count + 1) * self._record_bytes > self._max_bytes:
            raise self._full_error()
        x, y = decode()
        if not self._count:
            self._x, self._y = np.empty_like(x[0]), np.empty_like(y[0])  # only their types and shapes count
        for array, first, what in ((x, self._x, "samples"), (y, self._y, "labels")):
            if (array.dtype, array.shape[1:]) != (first.dtype, first.shape):
                expected = f"{first.dtype} {shape_text(*first.shape)}"
                got = f"{array.dtype} {shape_text(*array.shape[1:])}"
                raise DataError(f"the {what}", expected=expected, got=got)
        if (self._count + len(x)) * self._record_bytes > self._max_bytes and self._count:
            raise self._full_error()
        records = np.empty((len(x), self._record_bytes), np.uint8)
        for begin, array in ((0, x), (self._x.nbytes, y)):
            raw = np.ascontiguousarray(array).reshape(len(x), -1).view(np.uint8)
            records[:, begin : begin + raw.shape[1]] = raw
        with storage_errors("can't write decoded samples"):
            write_all(self._file.fileno(), records.tobytes(), self._count * self._record_bytes)
        self._rows[name] = range(self._count, self._count + len(x))
        self._count += len(x)
        return self._rows[name]

    def inputs(self, rows: npt.NDArray[np.int64], convert: Callable[[Array], Array]) -> StoredArray:
        """Samples of these rows, each turned by `convert` from the decoded numbers into a model's input."""
        positions = rows * self._record_bytes
        return StoredArray.at_positions(self._file, positions, self._x.dtype, self._x.shape, convert)

    def labels(self, rows: npt.NDArray[np.int64]) -> Array | StoredArray:
        """The labels of these rows; scalar labels are held in memory."""
        positions = rows * self._record_bytes + self._x.nbytes
        stored = StoredArray.at_positions(self._file, positions, self._y.dtype, self._y.shape)
        return replace(stored, in_range=True) if self._y.ndim else stored[:]

    @property
    def _record_bytes(self) -> int:
        return self._x.nbytes + self._y.nbytes

    def _full_error(self) -> CacheFullError:
        return CacheFullError("room for decoded samples", expected=f"at most {self._max_bytes} bytes", got="more")
