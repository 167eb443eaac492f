"""Turns the cells of CSV and Parquet files into numbers, and explains which cell can't be turned into one.

Errors may be sent to the server, so that they quote neither a cell nor the name of a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune_device.data.table_columns import CLASS, TIME, TableColumns, is_missing, is_number

_MAX_ROUNDING = 1.0  # numbers that float32 changes by more are refused: seconds since 1970, keys of databases
BLOCK_CELLS = 2**14  # cells of a file that are held at once: as a Python string each takes some 60 bytes
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d{1,2}:\d{2}")
_TRUTH = {"true": "1", "false": "0"}
CONVERT_HINT = "A net takes numbers: write them as such"
TIMES_HINT = (
    f"{CONVERT_HINT}, for example the hour of the day. A column that tells when a row was measured is no input if it "
    f"is called {TIME}."
)
COMMAS_HINT = (
    "Write nothing between thousands, and before the decimals a point in all numbers, or a comma in all: 1200.5 or "
    "1200,5."
)
_LARGE_HINT = (
    "Scale the column, as a net takes small numbers, such as value / 1e6. A column that tells when a row was measured "
    f"is no input if it is called {TIME}."
)
_GAPS_HINT = "Say what the board does with these: --missing hold, mean or drop. Or fill them yourself."
_TEXTS_HINT = f"{CONVERT_HINT}, call the column {CLASS} if it has the classes, or leave it out (--columns)."
_TEXT_COLUMN_HINT = (
    f"{_TEXTS_HINT} If each row is a change of one of several sensors, write a column for each sensor; of a single "
    "sensor take only the column of its states, such as --columns state."
)
_NAMES_ROW_HINT = "Names of columns are one row: leave a second one, such as of units, out."
_NAMES_HINT = "Give the classes' names in the order that all boards share: --class-names A,B,C."


class RowPlaces(NamedTuple):
    """Where rows of a table are: the number of the first, without the names, and the line of each in a file of text."""

    first: int
    lines: Sequence[int] = ()

    def text(self, row: int, column: int) -> str:
        """A cell's place in words; `row` is the index among these rows, `column` that in the file."""
        line = f" (line {self.lines[row]})" if self.lines else ""
        return f"row {self.first + row}, column {column + 1}{line}"


def rows_of_cells(
    columns: TableColumns,
    cells: Sequence[Any],
    places: RowPlaces,
    class_names: tuple[str, ...],
    decimals: Callable[[list[str]], list[str]] | None = None,
    *,
    allows_missing: bool = False,
) -> npt.NDArray[np.float32]:
    """Cells by column as rows [n, columns] of numbers. Raises `DataError` for the first cell that is no number.

    `places` are those of the rows, for errors; `decimals` writes the numbers of a column with a point. A
    missing number is NaN if `allows_missing`.
    """
    rows = np.empty((len(cells[0]), len(cells)), np.float32)
    for position, (index, column) in enumerate(zip(columns.all, cells, strict=True)):
        is_class = index in columns.classes
        texts = _class_numbers(column, class_names) if is_class else column if decimals is None else decimals(column)
        values = _cell_numbers(texts)
        with np.errstate(all="ignore"):
            rows[:, position] = values
            is_valid = np.isfinite(rows[:, position]) & (np.abs(rows[:, position] - values) < _MAX_ROUNDING)
            is_valid &= not is_class or ((values >= 0) & (values < 2**24) & (values % 1 == 0))
        if allows_missing:
            is_valid[[i for i in np.flatnonzero(~is_valid) if is_missing(column[i])]] = True
        if not is_valid.all():
            bad = int(np.argmin(is_valid))
            is_text_column = not np.isfinite(values).any() and isinstance(column[bad], str)
            is_head = places.first + bad == 1 and not any(is_number(column[0]) for column in cells)
            hint = _TEXT_COLUMN_HINT if is_text_column else _NAMES_ROW_HINT if is_head else _TEXTS_HINT
            where = places.text(bad, index)
            raise _cell_error(where, column[bad], class_names, is_class=is_class, text_hint=hint)
    return rows


def _cell_error(where: str, cell: Any, class_names: tuple[str, ...], *, is_class: bool, text_hint: str) -> DataError:
    """The error for a cell, with a hint that loses no data: for a text it is `text_hint`."""
    cell = cell.strip().lower() if isinstance(cell, str) else cell
    got, hint = "a text", text_hint
    if is_missing(cell):
        got, hint = "no number (missing)" if cell else "an empty cell", _GAPS_HINT
    elif is_class:
        hint = _NAMES_HINT
    elif is_number(cell):
        got, hint = "one that changes in float32", _LARGE_HINT
    elif not isinstance(cell, str):
        hint = _GAPS_HINT
    elif _DATE.match(cell):
        hint = TIMES_HINT
    elif "," in cell and any(map(str.isdigit, cell)):
        hint = COMMAS_HINT
    elif cell[:1].isdecimal():
        hint = "Write numbers alone: without a unit, and with nothing between thousands."
    expected = (" or ".join(class_names) or "a whole number from 0") if is_class else "a number"
    return DataError(where, expected=expected, got=got, hint=hint)


def _cell_numbers(cells: Any) -> npt.NDArray[np.float64]:
    """The numbers of cells, NaN for a cell that has none."""
    try:
        values = np.asarray(cells, np.float64)
        texts = isinstance(cells, list) or cells.dtype == object
        if texts and any("_" in cell for cell in cells if isinstance(cell, str)):
            raise ValueError  # Python reads 1_2 as 12
        return values
    except (ValueError, TypeError):
        known = [_TRUTH.get(cell.strip().lower(), cell) if isinstance(cell, str) else cell for cell in cells]
        return np.array([float(cell) if is_number(cell) else np.nan for cell in known], np.float64)


def _class_numbers(column: Any, class_names: tuple[str, ...]) -> list[Any]:
    numbers = {name: number for number, name in enumerate(class_names)}
    cells = (cell.strip() if isinstance(cell, str) else cell for cell in column)
    return [numbers.get(cell, cell) for cell in cells]
