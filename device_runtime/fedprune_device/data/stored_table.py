"""Copies a table's rows to a file without a name, in the order of their times, with the places where time jumps.

Nothing of the table stays in memory but these places, and a mark for each row if numbers are missing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import open_file, storage_errors, write_all
from fedprune.core.errors import DataError, error_reason
from fedprune.core.median import median
from fedprune.core.text import encoding_of, quantity
from fedprune_device.data.csv_tables import open_csv
from fedprune_device.data.parquet_tables import open_parquet
from fedprune_device.data.stored_array import Array, OpenFiles, Rows, StoredArray
from fedprune_device.data.table_columns import OpenTable, TableColumns
from fedprune_device.data.table_options import TableOptions

NO_NUMBER, NO_CLASS = 1, 2  # marks of rows

_GAP_STEPS = 1.5  # times the usual step between two rows that are a gap
_ROWS_FOR_STEP = 2**16  # rows whose steps decide the usual one
_CHUNK_ROWS = 2**13
_WHEN_MISSING = {
    "hold": "each holds the number before it, and windows without one before are left out",
    "mean": "each is the mean of its column over the training rows",
    "drop": "windows that have one are left out",
}


_MIN_COUNTED_ROWS = 10  # fewer may be measurements that happen to rise


CSV, PARQUET = (".csv", ".tsv"), ".parquet"

_DEFAULTS = TableOptions()


@dataclass(frozen=True)
class StoredTable:
    """A table's rows in a file without a name, as float32 [count, columns], NaN where a number is missing.

    Attributes:
        starts: The rows, ascending, before which time jumps: no window may span the place.
        marks: `NO_NUMBER` and `NO_CLASS` of each row [count]; None if nothing is missing.
        counters: The inputs, each as its index in the file, that count the rows.
    """

    file: OpenFiles
    columns: TableColumns
    count: int
    starts: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    marks: npt.NDArray[np.uint8] | None = None
    counters: tuple[int, ...] = ()

    def windows(self, first: Rows, rows: int, convert: Callable[[Array], Array]) -> StoredArray:
        """Windows of `rows` rows [n, rows, columns], converted."""
        width = len(self.columns.all)
        return StoredArray.at_positions(self.file, first * (4 * width), np.dtype(np.float32), (rows, width), convert)

    def rows(self, first: int, count: int) -> Array:
        """Some rows [n, columns], of those that exist."""
        count = min(count, self.count - first)
        return np.asarray(_array(self.file, np.float32, (self.count, len(self.columns.all)))[first : first + count])


def read_table(
    path: Path, class_names: tuple[str, ...], options: TableOptions, spool: Path | None, max_bytes: int
) -> tuple[StoredTable, list[str]]:
    """Copy a table to a file in `spool`; returns it with notes on what was chosen.

    Raises `DataError` if it can't be read, or its numbers take more than `max_bytes` bytes.
    """
    count = missing_cells = 0
    with open_table(path, class_names, options) as table, storage_errors("can't write the numbers of a table"):
        file, time_file, times_of_rows = OpenFiles.in_folder(spool), OpenFiles.in_folder(spool), _Times(options.step)
        row_counters = RowCounters(len(table.columns.inputs))
        for numbers, times in table.blocks:
            width = numbers.shape[1] * 4
            if (count + len(numbers)) * width > max_bytes:
                raise DataError("numbers", expected=f"at most {max_bytes // 4}", got="more")
            write_all(file.fileno(), numbers.tobytes(), count * width)
            if times is not None:
                write_all(time_file.fileno(), times.tobytes(), count * 8)
                times_of_rows.add(times, numbers)
            count += len(numbers)
            row_counters.add(numbers[:, : len(table.columns.inputs)])
            missing_cells += int(np.isnan(numbers).sum())
        counters = tuple(table.columns.inputs[position] for position in row_counters.positions)
        stored = StoredTable(file, table.columns, count, counters=counters)
        notes = table.notes()
        if times_of_rows.count:
            stored = times_of_rows.in_order(stored, time_file, spool)
            notes += times_of_rows.notes
        elif options.step is not None:
            raise DataError(f"{path}: --step", expected="a table with a column of times, such as time", got="none")
        if missing_cells:
            stored = _with_marks(_held(stored, spool) if options.missing == "hold" else stored)
            cells = quantity(missing_cells, "missing number")
            notes.append(f"{cells}: {_WHEN_MISSING[options.missing]} (--missing {options.missing})")
        return stored, notes


class _Times:
    """What is known of the times of a table's rows while these are read."""

    def __init__(self, step: float | None) -> None:
        self._step = step
        self._first_times: list[Array] = []
        self._last: tuple[float, Array] | None = None
        self._repeated = 0
        self._copies: list[Array] = []  # rows that repeat the one before, with its time
        self.count = 0
        self.notes: list[str] = []

    def add(self, times: npt.NDArray[np.float64], numbers: Array) -> None:
        if not len(times):
            return
        if self.count < _ROWS_FOR_STEP:
            self._first_times.append(times)
        before, row_before = self._last or (np.nan, numbers[0])
        repeats = times == np.concatenate([[before], times[:-1]])
        if repeats.any():
            rows_before = np.concatenate([row_before[None], numbers[:-1]])
            are_equal = ((numbers == rows_before) | (np.isnan(numbers) & np.isnan(rows_before))).all(axis=1)
            self._repeated += int(repeats.sum())
            self._copies.append(self.count + np.flatnonzero(repeats & are_equal))
        self._last = float(times[-1]), numbers[-1]
        self.count += len(times)

    def in_order(self, stored: StoredTable, time_file: OpenFiles, spool: Path | None) -> StoredTable:
        """The rows without copies, the oldest first, with the places where time jumps."""
        steps = np.abs(np.diff(np.concatenate(self._first_times)))
        steps = steps[steps > 0]
        usual = self._step or (median(steps) if len(steps) else np.inf)
        times = _array(time_file, np.float64, (stored.count,))
        backward, gaps, unknown, forward = [], [], [], 0
        for first in range(0, stored.count - 1, _CHUNK_ROWS):
            differences = np.diff(times[first : first + _CHUNK_ROWS + 1])
            backward.append(first + 1 + np.flatnonzero(differences < 0))
            gaps.append(first + 1 + np.flatnonzero(np.abs(differences) > _GAP_STEPS * usual))
            unknown.append(first + 1 + np.flatnonzero(np.isnan(differences)))
            forward += int((differences > 0).sum())
        back_rows, gap_rows, unknown_rows = (_concatenate_rows(parts) for parts in (backward, gaps, unknown))
        is_reversed = not forward and len(back_rows) > 0
        starts = gap_rows if is_reversed else np.union1d(back_rows, gap_rows)
        starts = np.union1d(starts, unknown_rows)
        copies = _concatenate_rows(self._copies)
        if len(copies) < self._repeated:
            copies = copies[:0]
            self.notes.append(
                f"{quantity(self._repeated, 'row')} have the time of the row before and other numbers: all stay, in "
                "the file's order"
            )
        if is_reversed:
            self.notes.append("the newest row comes first: the board takes the rows from the last to the first")
        elif len(back_rows):
            self.notes.append(f"time goes back before {quantity(len(back_rows), 'row')}: no window spans such a place")
        if len(unknown_rows):
            self.notes.append(f"no window spans a row without a time, or of another zone: {len(unknown_rows)} places")
        gap_count = len(gap_rows) if is_reversed else len(np.setdiff1d(gap_rows, back_rows))
        if gap_count:
            source = "--step" if self._step else "the median step"
            self.notes.append(
                f"{quantity(gap_count, 'gap')} of more than {_GAP_STEPS:g} times {usual:g} s ({source}): no window "
                "spans one"
            )
        if not len(copies) and not is_reversed:
            return replace(stored, starts=starts)
        if len(copies):
            self.notes.append(f"{quantity(len(copies), 'row')} repeat the row before with its time, and are left out")
        order = np.delete(np.arange(stored.count, dtype=np.int64), copies)
        starts = starts - np.searchsorted(copies, starts)
        if is_reversed:
            order, starts = order[::-1], len(order) - starts[::-1]
        columns, out = len(stored.columns.all), OpenFiles.in_folder(spool)
        rows = _array(stored.file, np.float32, (stored.count, columns))
        for first in range(0, len(order), _CHUNK_ROWS):
            write_all(out.fileno(), rows[order[first : first + _CHUNK_ROWS]].tobytes(), 4 * columns * first)
        return replace(stored, file=out, count=len(order), starts=starts)


def _concatenate_rows(parts: list[Array]) -> Rows:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _array(file: OpenFiles, dtype: type[np.generic], shape: tuple[int, ...]) -> StoredArray:
    return StoredArray(file, None, 0, np.dtype(dtype), shape, checked=True, converted_type=dtype)


def _held(stored: StoredTable, spool: Path | None) -> StoredTable:
    """The rows with each missing number replaced by the one before it, unless time jumps between them."""
    out, width = OpenFiles.in_folder(spool), len(stored.columns.all)
    is_start = np.zeros(stored.count, bool)
    is_start[stored.starts] = True
    before = np.full(width, np.nan, np.float32)
    for first in range(0, stored.count, _CHUNK_ROWS):
        rows = stored.rows(first, _CHUNK_ROWS)
        filled = np.concatenate([before[None], rows])
        segment = np.cumsum([False, *is_start[first : first + len(rows)]])
        last = np.maximum.accumulate(np.where(np.isnan(filled), 0, np.arange(len(filled))[:, None]), axis=0)
        held = np.take_along_axis(filled, last, axis=0)
        filled = np.where(segment[last] == segment[:, None], held, filled)
        before = filled[-1]
        if stored.columns.classes:
            filled[1:, -1] = rows[:, -1]
        write_all(out.fileno(), np.ascontiguousarray(filled[1:], np.float32).tobytes(), 4 * width * first)
    return replace(stored, file=out)


def _with_marks(stored: StoredTable) -> StoredTable:
    marks = np.zeros(stored.count, np.uint8)
    numbers = len(stored.columns.all) - len(stored.columns.classes)
    for first in range(0, stored.count, _CHUNK_ROWS):
        are_missing = np.isnan(stored.rows(first, _CHUNK_ROWS))
        marks[first : first + len(are_missing)] = NO_NUMBER * are_missing[:, :numbers].any(
            axis=1
        ) + NO_CLASS * are_missing[:, numbers:].any(axis=1)
    return replace(stored, marks=marks)


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
        return np.flatnonzero((self._is_rising | self._is_falling) & (self._count >= _MIN_COUNTED_ROWS))


@contextmanager
def open_table(path: Path, class_names: tuple[str, ...], options: TableOptions = _DEFAULTS) -> Iterator[OpenTable]:
    """The columns of a file, and its rows in blocks. A missing number is NaN if the options allow it, else an error.

    A class is a number; for a name in `class_names` it is the name's index. Raises `DataError`, which names the file
    and the row, `StorageError` if the file can't be read, `MissingExtraError` for Parquet without pyarrow.
    """
    try:
        with storage_errors(f"can't read {path}"):
            if path.suffix.lower() == PARQUET:
                with open_parquet(path, class_names, options) as table:
                    yield table
            else:
                with open_file(path) as start:
                    encoding = encoding_of(start.read(2))
                with path.open(encoding=encoding, newline="") as file:
                    yield open_csv(file, class_names, options)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (UnicodeError, csv.Error) as error:
        hint = "Save it as CSV UTF-8." if isinstance(error, UnicodeError) else ""
        raise DataError(f"{path} is no table", expected="CSV in UTF-8", got=error_reason(error), hint=hint) from error
