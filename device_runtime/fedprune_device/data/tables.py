"""The rows of CSV and Parquet files, a few at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError, FedpruneError, MissingExtraError, reason
from fedprune.core.zip_limits import MOST_INFLATED, MOST_RATIO

CSV, PARQUET = ".csv", ".parquet"

CLASS = "class"  # the column of classes
TARGET = "target"  # what names of columns to predict begin with
SKIPPED = ("", "time", "timestamp", "date", "datetime")  # columns of no numbers: when a row was measured, its number

_MOST_COLUMNS = 4096
_MOST_LINE = 2**20  # characters
_CELLS = 2**14  # cells of a file that are held at once
_BUFFERED = 2**16  # bytes of a column of a Parquet file that are read at once; otherwise all of a row group are


@dataclass(frozen=True)
class Columns:
    """The columns of a table by their role, each as its place in the file: the order in which rows are stored."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> Columns:
        """Raises `DataError` if names are missing, twice there, or there are too many."""
        used = [place for place, name in enumerate(names) if name.lower() not in SKIPPED]
        if len(names) > _MOST_COLUMNS:
            raise DataError("columns", expected=f"at most {_MOST_COLUMNS}", got=len(names))
        for place in used:
            if (first := names.index(names[place])) != place:
                raise DataError(
                    "names of columns",
                    expected="different ones",
                    got=f"that of column {first + 1} for {place + 1}, too",
                )
        if used and all(_is_number(names[place]) for place in used):
            raise DataError("the first row", expected="names of columns", got="numbers")
        numbers = [place for place in used if names[place] != CLASS]
        targets = tuple(place for place in numbers if names[place].startswith(TARGET))
        inputs = tuple(place for place in numbers if place not in targets)
        if not inputs:
            raise DataError("columns", expected="some of numbers to read", got="none")
        return cls(inputs, targets, tuple(place for place in used if names[place] == CLASS))

    @property
    def all(self) -> tuple[int, ...]:
        return self.inputs + self.targets + self.classes


@contextmanager
def rows_of(path: Path, class_names: tuple[str, ...]) -> Iterator[tuple[Columns, Iterator[npt.NDArray[np.float32]]]]:
    """The columns of a file, and its rows [n, columns] in parts.

    Classes are numbers, names that are in `class_names` as their place there. Raises `DataError`, which names the file
    and the row, `StorageError` if the file can't be read, `MissingExtraError` for Parquet without pyarrow.
    """
    try:
        with storage_errors(f"can't read {path}"):
            if path.suffix.lower() == PARQUET:
                with _parquet(path, class_names) as found:
                    yield found
            else:
                with path.open(encoding="utf-8-sig", newline="") as file:
                    yield _csv(file, class_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table", expected="CSV in UTF-8", got=reason(error)) from error


def _csv(file: Any, class_names: tuple[str, ...]) -> tuple[Columns, Iterator[npt.NDArray[np.float32]]]:
    lines = _lines(file)
    first = next(lines, "")
    split = max(",;\t", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=split), [])]
    columns = Columns.of(names)

    def parts() -> Iterator[npt.NDArray[np.float32]]:
        rows: list[list[str]] = []
        begin = 1
        for row in csv.reader(lines, delimiter=split):
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(f"row {begin + len(rows)}", expected=f"{len(names)} columns", got=len(row))
            rows.append(row)
            if len(rows) * len(names) >= _CELLS:
                yield _numbers(columns, [[row[p] for row in rows] for p in columns.all], begin, class_names)
                begin += len(rows)
                rows = []
        if rows:
            yield _numbers(columns, [[row[p] for row in rows] for p in columns.all], begin, class_names)

    return columns, parts()


def _lines(file: Any) -> Iterator[str]:
    while line := file.readline(_MOST_LINE):
        if len(line) == _MOST_LINE and not line.endswith("\n"):
            raise DataError("a line", expected=f"at most {_MOST_LINE} characters", got="more")
        yield line


def _check_unpacked(metadata: Any, packed: int, columns: int) -> None:
    """Refuse a Parquet file that says it unfolds to far more than it has: a few bytes can hold a billion equal rows."""
    groups = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    unpacked = max(groups, 4 * columns * metadata.num_rows)
    if unpacked > max(MOST_INFLATED, MOST_RATIO * packed):
        raise DataError(
            "size when it is unpacked",
            expected=f"at most {MOST_INFLATED} bytes, or {MOST_RATIO} times what it takes in the file",
            got=unpacked,
        )


@contextmanager
def _parquet(path: Path, class_names: tuple[str, ...]) -> Iterator[tuple[Columns, Iterator[npt.NDArray[np.float32]]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise MissingExtraError("Parquet files need pyarrow", extra="parquet") from error

    def parts() -> Iterator[npt.NDArray[np.float32]]:
        begin, wanted = 1, [names[place] for place in columns.all]
        for batch in file.iter_batches(max(1, _CELLS // len(wanted)), columns=wanted):
            found = [batch.column(name) for name in wanted]
            yield _numbers(columns, [c.to_numpy(zero_copy_only=False) for c in found], begin, class_names)
            begin += len(batch)

    try:
        with ParquetFile(path, buffer_size=_BUFFERED, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = Columns.of(names)
            _check_unpacked(file.metadata, path.stat().st_size, len(columns.all))
            yield columns, parts()
    except (FedpruneError, OSError):
        raise
    except (ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise DataError("no table", expected="Parquet", got=reason(error)) from error


def _numbers(
    columns: Columns, cells: Sequence[Any], begin: int, class_names: tuple[str, ...]
) -> npt.NDArray[np.float32]:
    """Cells by column as rows of numbers; `begin` is the number of the first row."""
    out = np.empty((len(cells[0]), len(cells)), np.float32)
    for number, (place, column) in enumerate(zip(columns.all, cells, strict=True)):
        classes = place in columns.classes
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(_classes(column, class_names) if classes else column, np.float64)
                out[:, number] = found
            right = np.isfinite(out[:, number]) & (not classes or (found >= 0) & (found < 2**24) & (found % 1 == 0))
        except (ValueError, TypeError):
            right = np.array([_is_number(cell) for cell in column])
        if not right.all():
            bad = int(np.argmin(right))
            wanted = (" or ".join(class_names) or "a whole number from 0") if classes else "a number"
            # A message may be sent to the server: it doesn't quote what is in the table.
            got = "an empty cell" if column[bad] in ("", None) else "something else"
            hint = "" if classes else f"Leave columns of no numbers out, or call them {', '.join(SKIPPED[1:])}."
            raise DataError(f"row {begin + bad}, column {place + 1}", expected=wanted, got=got, hint=hint)
    return out


def _classes(column: Any, class_names: tuple[str, ...]) -> list[Any]:
    numbers = {name: number for number, name in enumerate(class_names)}
    cells = (cell.strip() if isinstance(cell, str) else cell for cell in column)
    return [numbers.get(cell, -1 if isinstance(cell, str) and not cell.isdecimal() else cell) for cell in cells]


def _is_number(cell: Any) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except (ValueError, TypeError, OverflowError):
        return False
