"""Reads samples that stay on the disk, row by row, as batches are drawn.

Rows are read with `pread` rather than mapped: mapped pages count as this process's memory, and a file that is cut short
while it is mapped kills the process instead of raising an error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

FILE_STRIDE = 2**48  # more bytes than any file has: the factor that separates offsets of several files

# Bytes that are read or written at once: enough for a disk's speed, little beside a training's memory.
CHUNK_BYTES = 2**20


class OpenFiles:
    """Open files, closed when nothing refers to them. Files without a name vanish then, however the process ends."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    @classmethod
    def in_folder(cls, folder: Path | None) -> OpenFiles:
        """A new empty file in a folder, or in the system's folder for temporary ones. Raises `OSError`."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            return cls(os.dup(file.fileno()))

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def fileno(self) -> int:
        return self.descriptors[0]


# Whole numbers that aren't identifiers: pixels, levels of a sound, marks.
_SHORT_TYPES = tuple(np.dtype(kind) for kind in (np.uint8, np.int8, np.int16, np.bool_))


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array of samples [n, ...] on the disk.

    Attributes:
        file: A path, or open files, which may have no name.
        stamp: The inode, size and modification time that the file must keep; None for a file that only grows.
        offset: Where the array begins in the file, which has it in `file_dtype` and `file_shape`.
        rows: The samples of this array; None for all that the file has.
        checked: Whether all numbers are known to be finite, and token ids not to be negative.
        convert: Turns the numbers of the file into samples of `sample_shape` and `converted_type`.
        positions: Where each sample begins, in bytes plus `FILE_STRIDE` times the index of the file; None if samples
            follow each other.
        in_range: Whether they are known to fit the model as labels.
    """

    file: Path | OpenFiles
    stamp: tuple[int, int, int] | None
    offset: int
    file_dtype: np.dtype[Any]
    file_shape: tuple[int, ...]
    rows: Rows | None = None
    checked: bool = False
    convert: Callable[[Array], Array] | None = None
    sample_shape: tuple[int, ...] | None = None
    positions: Rows | None = None
    in_range: bool = False
    converted_type: type[np.generic] = np.float32

    @classmethod
    def at_positions(
        cls,
        file: OpenFiles,
        positions: Rows,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        convert: Callable[[Array], Array] | None = None,
    ) -> StoredArray:
        """Checked samples [n, *shape], one at each of these positions, each turned by `convert`."""
        stored = cls(file, None, 0, dtype, (len(positions), *shape), checked=True, positions=positions)
        if convert is None:
            return stored
        example = convert(np.zeros((1, *shape), dtype))
        return replace(stored, convert=convert, sample_shape=example.shape[1:], converted_type=example.dtype.type)

    @property
    def dtype(self) -> np.dtype[Any]:
        stays_whole = self.file_dtype.kind in "iub" and self.convert is None
        return type_in_memory(self.file_dtype) if stays_whole else np.dtype(self.converted_type)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *(self.file_shape[1:] if self.sample_shape is None else self.sample_shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(0 if indices is None else indices.nbytes for indices in (self.rows, self.positions))

    def __len__(self) -> int:
        return self.file_shape[0] if self.rows is None else len(self.rows)

    def __getitem__(self, rows: Any) -> Array:
        """Some samples, by their numbers or a slice, read now. Raises `DataError` if the file has changed."""
        chosen = _row_numbers(rows, len(self)) if self.rows is None else self.rows[rows]
        sample_bytes = self.file_dtype.itemsize * prod(self.file_shape[1:])
        raw = np.empty((np.size(chosen), *self.file_shape[1:]), self.file_dtype)
        buffer = memoryview(raw.reshape(-1).view(np.uint8).data)
        with self._open() as descriptors:
            done = 0
            for position, count in self._runs_of(np.atleast_1d(chosen), sample_bytes):
                chunk = buffer[done * sample_bytes : (done + count) * sample_bytes]
                self._fill(descriptors[position // FILE_STRIDE], chunk, position % FILE_STRIDE)
                done += count
        samples = raw.astype(self.dtype, copy=False) if self.convert is None else self.convert(raw)
        return samples if np.ndim(chosen) else samples[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def after_reading(self, function: Callable[[Array], Array]) -> StoredArray:
        """This array with a function of samples [n, ...] that is applied as they are read."""
        example = function(np.zeros((0, *self.shape[1:]), self.dtype))
        first, dtype = self.convert, self.dtype

        def convert(raw: Array) -> Array:
            return function(raw.astype(dtype, copy=False) if first is None else first(raw))

        return replace(self, convert=convert, sample_shape=example.shape[1:], converted_type=example.dtype.type)

    def as_float32(self) -> StoredArray:
        """This array, read as float32."""
        return self if self.dtype == np.float32 else replace(self, convert=lambda raw: raw.astype(np.float32))

    def select(self, rows: Rows) -> StoredArray:
        return replace(self, rows=np.asarray(rows if self.rows is None else self.rows[rows], np.int64))

    def chunks(self) -> Iterator[Array]:
        """All samples in order, a few at a time; errors are those of reading some."""
        step = max(1, CHUNK_BYTES // max(1, self.dtype.itemsize * prod(self.shape[1:])))
        return (self[start : start + step] for start in range(0, len(self), step))

    def _runs_of(self, rows: Rows, sample_bytes: int) -> Iterator[tuple[int, int]]:
        """Runs of neighbouring samples: the position of each, and its number of samples."""
        if self.positions is not None:
            return ((int(position), 1) for position in self.positions[rows])
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        return ((self.offset + int(run[0]) * sample_bytes, len(run)) for run in runs)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[int, ...]]:
        with contextlib.ExitStack() as stack, storage_errors(f"can't read {self._name}"):
            if isinstance(self.file, Path):
                descriptors: tuple[int, ...] = (stack.enter_context(self.file.open("rb")).fileno(),)
            else:
                descriptors = self.file.descriptors
            if self.stamp is not None and file_stamp(descriptors[0]) != self.stamp:
                raise self._changed_error()
            yield descriptors

    def _fill(self, descriptor: int, buffer: memoryview, position: int) -> None:
        while buffer:
            count = os.preadv(descriptor, [buffer], position)
            if not count:
                raise self._changed_error()
            buffer, position = buffer[count:], position + count

    @property
    def _name(self) -> str:
        return str(self.file) if isinstance(self.file, Path) else "the copy of the samples"

    def _changed_error(self) -> DataError:
        return DataError(
            f"{self._name} has changed since it was opened",
            expected="a file that stays as it is",
            hint="Write new samples to another file, rename it over this one, and restart the device.",
        )


# Samples or labels in memory or on the disk: both give some as an array by `x[rows]`.
Inputs: TypeAlias = "Array | StoredArray"


def type_in_memory(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which numbers of a file are held: short whole numbers stay as small as they are."""
    if dtype.kind == "f":
        return np.dtype(np.float32)
    return dtype if dtype in _SHORT_TYPES else np.dtype(np.int64)


def select_rows(x: Inputs, rows: Rows) -> Inputs:
    return x.select(rows) if isinstance(x, StoredArray) else x[rows]


def select_pairs(x: Inputs, y: Inputs, rows: Rows) -> tuple[Inputs, Inputs]:
    """Some samples and their labels; one object where samples are their own labels."""
    selected = select_rows(x, rows)
    return selected, selected if y is x else select_rows(y, rows)


def as_inputs(values: object) -> Inputs:
    return values if isinstance(values, StoredArray) else np.asarray(values)


def type_text(array: Inputs) -> str:
    """An array's type and shape, for messages."""
    return f"{array.dtype} [{', '.join(['n', *map(str, array.shape[1:])])}]"


def chunks(x: Inputs) -> Iterator[Array]:
    """All samples in order: an array in memory at once, a stored one a few samples at a time."""
    return x.chunks() if isinstance(x, StoredArray) else iter((x,))


def file_stamp(descriptor: int) -> tuple[int, int, int]:
    """By what a change of an open file is noticed."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _row_numbers(rows: Any, count: int) -> Rows:
    """Numbers of the samples that an index chooses of `count`; uses memory only for these."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(count), dtype=np.int64)
    chosen = np.asarray(rows)
    chosen = (np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen).astype(np.int64)
    chosen = np.where(chosen < 0, chosen + count, chosen)
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < count:
        raise IndexError(f"samples {chosen.min()} to {chosen.max()} of {count}")
    return chosen
