"""Tells by their names which columns of a table are inputs, numbers to predict (targets), classes and times."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError

CLASS = "class"  # the column of classes
CLASSES = (CLASS, "label")  # its names, in any case
TARGET = "target"  # what names of columns to predict begin with, in any case
# Names of columns with times, in any case, also with a unit such as `time (s)` or `timestamp_ms`.
TIMESTAMPS = (
    "timestamp", "time_stamp", "datetime", "date_time", "ts", "_time", "last_changed", "last_updated", "unix",
    "unixtime", "unix_time", "epoch", "epoch_time",
)  # fmt: skip
TIME, DATE, MOMENT = "time", "date", "moment"  # kinds of columns; the first two are names of columns, too
# What programs write for a missing number.
_MISSING = frozenset(
    ("", "na", "n/a", "nan", "null", "none", "nil", "<na>", "nat", "-", "--", "?", "unavailable", "unknown")
)
# Errors of a spreadsheet's formulas, in English and German.
_FORMULA_ERROR = re.compile(r"#(?:n/a|nv|div/0!|num!|zahl!|value!|wert!|ref!|bezug!|name\?|null!)", re.IGNORECASE)
_UNIT = re.compile(r"\s*[(\[][^)\]]*[)\]]$|_(?:s|ms|us|ns|utc|local)$")
_INDEX = re.compile(r"|unnamed: 0|__index_level_\d+__")  # an index without a name, as pandas and R write it
_MAX_COLUMNS = 4096


class ColumnsError(DataError):
    """Columns don't fit; the message names none, as the server may get it.

    Attributes:
        names: The columns to choose from, for messages that stay on the board.
    """

    def __init__(self, what: str, names: Sequence[str], **clauses: Any) -> None:
        super().__init__(what, **clauses)
        self.names = tuple(names)


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table by their role, each as its index in the file. Rows are read in the order of `all`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    classes: tuple[int, ...]
    times: tuple[tuple[int, ...], ...] = ()  # what may be the times, in the order of preference (`TimeReader`)
    index: int | None = None  # a column without a name, the last of `times`
    names: tuple[str, ...] = ()  # of `all`, in lower case

    @classmethod
    def of(
        cls, names: Sequence[str], kinds: Mapping[int, str] | None = None, chosen: Sequence[str] = ()
    ) -> TableColumns:
        """The roles of columns. `kinds` are those of columns by their cells: `MOMENT`, `DATE` without a time, `TIME`.

        The only column of dates is the times if none is called so. A column of times of the day beside it belongs to
        it.

        Only the `chosen` columns are inputs, in this order; by default all are. Raises `DataError` if names are
        missing, twice there, or there are too many.
        """
        lower_names = [name.lower() for name in names]
        times = _times_of(lower_names, kinds or {})
        used_columns = [i for i, name in enumerate(lower_names) if i not in times and not _INDEX.fullmatch(name)]
        order = [name.strip().lower() for name in chosen]
        if chosen:
            is_kept = [name in order or name in CLASSES or name.startswith(TARGET) for name in lower_names]
            used_columns = [column for column in used_columns if is_kept[column]]
        if len(names) > _MAX_COLUMNS:
            raise DataError("columns", expected=f"at most {_MAX_COLUMNS}", got=len(names))
        for column in used_columns:
            if (first := lower_names.index(lower_names[column])) != column:
                raise DataError(
                    "names of columns",
                    expected="different ones",
                    got=f"that of column {first + 1} for {column + 1}, too",
                )
        if used_columns and all(is_number(names[column].replace(",", ".")) for column in used_columns):
            raise DataError("the first row", expected="names of columns", got="numbers")
        classes = tuple(column for column in used_columns if lower_names[column] in CLASSES)
        if len(classes) > 1:
            column_texts = " and ".join(str(column + 1) for column in classes)
            hint = f"The others are inputs under another name, or left out: the one is called {CLASS}."
            raise DataError("columns of classes", expected="one", got=f"columns {column_texts}", hint=hint)
        targets = tuple(column for column in used_columns if lower_names[column].startswith(TARGET))
        inputs = tuple(column for column in used_columns if column not in targets + classes)
        if chosen:
            inputs = _in_order(inputs, names, order)
        if not inputs:
            raise DataError("columns", expected="some of numbers to read", got="none")
        index = next((i for i, name in enumerate(lower_names) if _INDEX.fullmatch(name)), None)
        all_names = tuple(lower_names[i] for i in inputs + targets + classes)
        return cls(inputs, targets, classes, _time_candidates(times, index), index, all_names)

    @property
    def all(self) -> tuple[int, ...]:
        return self.inputs + self.targets + self.classes

    @property
    def read(self) -> tuple[int, ...]:
        """The columns whose cells are needed, without repetition."""
        return tuple(dict.fromkeys([*self.all, *(column for columns in self.times for column in columns)]))


class TableBlock(NamedTuple):
    """Some rows of a table: their numbers [n, columns] in the order of `TableColumns.all`, NaN where one is missing,
    and their times [n] in seconds, if the table has times."""

    numbers: npt.NDArray[np.float32]
    times: npt.NDArray[np.float64] | None


class OpenTable(NamedTuple):
    """A table's columns, its rows, and what was chosen to read them: `notes` is complete once all rows were read."""

    columns: TableColumns
    blocks: Iterator[TableBlock]
    notes: Callable[[], list[str]]


def _in_order(inputs: Sequence[int], table_names: Sequence[str], order: Sequence[str]) -> tuple[int, ...]:
    """Columns in the order of these of their names; raises `ColumnsError` if one isn't among them."""
    names = [name.lower() for name in table_names]
    columns = {names[column]: column for column in inputs}
    for number, name in enumerate(order, 1):
        if name not in columns:
            got = "one of times, of classes, or to predict" if name in names else "no column of this name"
            what = f"name {number} of the chosen columns"
            raise ColumnsError(what, table_names, expected="a column of inputs", got=got)
    return tuple(columns[name] for name in order)


def _times_of(names: Sequence[str], cell_kinds: Mapping[int, str]) -> dict[int, str]:
    """The columns of times, by their names and the kinds of their cells."""
    own_names = {i: _UNIT.sub("", name) for i, name in enumerate(names)}
    times = {i: MOMENT if n in TIMESTAMPS else n for i, n in own_names.items() if n in (*TIMESTAMPS, TIME, DATE)}
    kinds = {i: kind for i, kind in cell_kinds.items() if not _INDEX.fullmatch(names[i])}
    dates = [i for i, kind in kinds.items() if kind != TIME]
    if not times and len(dates) == 1:
        times = {dates[0]: kinds[dates[0]]}
    if TIME in times.values() and DATE in times.values():
        return times
    for date in [i for i in times if kinds.get(i) == DATE]:
        clock = next((i for i in (date + 1, date - 1) if kinds.get(i) == TIME), None)
        if clock is not None:
            return times | {date: DATE, clock: TIME}
    return times


def _time_candidates(kinds: Mapping[int, str], index: int | None) -> tuple[tuple[int, ...], ...]:
    def of(kind: str) -> list[int]:
        return [i for i, other in kinds.items() if other == kind]

    pairs = [(date, time) for date in of(DATE)[:1] for time in of(TIME)[:1]]
    single_columns = of(MOMENT) + of(TIME) + of(DATE) + ([] if index is None else [index])
    stamps = [(i,) for i in of(MOMENT)]
    return tuple(dict.fromkeys([*stamps, *pairs, *((i,) for i in single_columns)]))


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty, or has what programs write for a missing number."""
    if isinstance(cell, str):
        return cell.strip().lower() in _MISSING or is_formula_error(cell)
    return cell is None or bool(cell != cell)  # NaN is unequal to itself


def is_formula_error(cell: str) -> bool:
    """Whether a cell has the error of a spreadsheet's formula, such as `#N/A`."""
    return _FORMULA_ERROR.fullmatch(cell.strip()) is not None


def is_number(cell: Any) -> bool:
    try:
        return bool(np.isfinite(float(cell))) and not (isinstance(cell, str) and "_" in cell)
    except (ValueError, TypeError, OverflowError):
        return False
