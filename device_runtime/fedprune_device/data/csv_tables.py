"""Reads CSV files in blocks of rows, with the delimiters and decimal marks of spreadsheets in many countries."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

from fedprune.core.errors import DataError
from fedprune.core.text import quantity
from fedprune_device.data.table_cells import BLOCK_CELLS, COMMAS_HINT, RowPlaces, rows_of_cells
from fedprune_device.data.table_columns import (
    OpenTable,
    TableBlock,
    TableColumns,
    is_formula_error,
    is_missing,
    is_number,
)
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_times import TimeReader, time_kind

_MAX_LINE_LENGTH = 2**20  # characters; without a limit a file without line breaks would be read as a whole
_DELIMITERS = ";\t|,"
_DELIMITER_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # a first line that tells Excel the delimiter
_OPENING_QUOTE = re.compile(r'(?<![^;\t|,]) *"')  # a cell: within one a quote is a character, as of inches
_QUOTED = re.compile(_OPENING_QUOTE.pattern + r'[^"]*(?:""[^"]*)*"')
_ANY_DELIMITER = re.compile(r"[;\t|,]")
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
_SPACES = " \u00a0\u2009\u202f"  # a space, and the thin and unbroken ones that typesetters put between thousands
_SPACED = re.compile(rf"[+\u2212-]?\d{{1,3}}([{_SPACES}])\d{{3}}(?:\1\d{{3}})*(?:[.,]\d+)?")
_NUMBER_BEGIN = re.compile(r"\s*[+\u2212-]?[.,]?\d|\s*[+-]?inf", re.IGNORECASE)
_STATES = ("true", "false", "on", "off", "yes", "no")
_WIDE_ROW_HINT = (
    "The first row has the names of all columns. Write nothing between thousands; where decimals come after a comma, "
    "separate columns by semicolons."
)
_MAX_EMPTY_ROWS = 2**16  # that are held until it is known whether they end the file


_NumberedRow = tuple[int, list[str]]  # the cells of a row, and the number of its last line in the file


def open_csv(file: Any, class_names: tuple[str, ...], options: TableOptions) -> OpenTable:
    """Read the names of the columns, and return the rows as an iterator."""
    comments = _Comments()
    lines = comments.skip(map(_Line, count(1), _limited_lines(file)))
    first_row = _row_lines(lines)
    delimiter_line = _DELIMITER_LINE.fullmatch(first_row[0].strip())
    head = [_row_lines(lines) if delimiter_line else first_row, _row_lines(lines)]
    head = comments.with_names(head)
    delimiter = delimiter_line[1] if delimiter_line else _delimiter(*map(_row_text, head[:2]))
    numbered_lines = _LineNumber(chain(*head, lines))
    reader = csv.reader(numbered_lines, delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader, [])]
    first_cells = next(csv.reader(head[-1], delimiter=delimiter, skipinitialspace=True), [])
    kinds = {i: kind for i, cell in enumerate(first_cells[: len(names)]) if (kind := time_kind(cell))}
    columns = TableColumns.of(names, kinds, options.columns)
    numbered_rows = ((numbered_lines.number, row) for row in reader if row)
    rows = _Rows(numbered_rows, names, columns, class_names)
    times, decimals = TimeReader(columns.times, columns.index), _Decimals(delimiter)

    separator = "" if delimiter == "," else f"columns are separated by {'tabs' if delimiter == chr(9) else delimiter}"

    def notes() -> list[str]:
        return list(filter(None, (separator, decimals.note, comments.note, rows.note, times.note)))

    blocks = _blocks(rows, class_names, decimals, times, allows_missing=options.allows_missing)
    return OpenTable(columns, blocks, notes)


def _blocks(
    rows: _Rows, class_names: tuple[str, ...], decimals: _Decimals, times: TimeReader, *, allows_missing: bool
) -> Iterator[TableBlock]:
    """The rows of a file in blocks of `BLOCK_CELLS` cells."""
    number, columns, checked_rows = 1, rows.columns, iter(rows)
    while block := list(islice(checked_rows, -(-BLOCK_CELLS // rows.width))):
        cells = {position: [row[position] for _, row in block] for position in columns.read}
        places = RowPlaces(number + rows.units, [line for line, _ in block])
        column_cells = [cells[position] for position in columns.all]
        numbers = rows_of_cells(columns, column_cells, places, class_names, decimals, allows_missing=allows_missing)
        yield TableBlock(numbers, times(cells, places))
        number += len(block)


class _Line(str):
    """A line of a file with its number, as some lines are read before others or left out."""

    __slots__ = ("number",)
    number: int

    def __new__(cls, number: int, text: str) -> _Line:
        line = super().__new__(cls, text)
        line.number = number
        return line


class _LineNumber:
    """Hands on lines, and keeps the number of the last one; one that isn't from the file has no number of its own."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self.number = lines, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number = line.number if isinstance(line, _Line) else self.number
            yield line


class _Comments:
    """Drops lines that begin with `#`. The last one before the first row may have the names, as numpy writes them."""

    def __init__(self) -> None:
        self._count = 0
        self._last = ""

    def skip(self, lines: Iterator[str]) -> Iterator[str]:
        is_quoted = False  # within a quoted text with line breaks, which may have such a line
        for line in lines:
            if not is_quoted and line.startswith("#") and not is_formula_error(_ANY_DELIMITER.split(line, 1)[0]):
                self._count += 1
                self._last = line
                continue
            is_quoted ^= line.count('"') % 2 == 1
            yield line

    def with_names(self, head: list[list[str]]) -> list[list[str]]:
        """The first rows, with the names before them if the last comment has these and the first row has numbers."""
        delimiter = _delimiter(*map(_row_text, head))
        cells = _row_text(head[0]).split(delimiter)
        names = self._last.lstrip("# ").split(delimiter)
        if not self._last or len(cells) != len(names) or any(map(_looks_numeric, names)):
            return head
        if not all(_looks_numeric(cell) or is_missing(cell) for cell in cells):
            return head
        self._count -= 1
        return [[self._last.lstrip("# ")], *head]

    @property
    def note(self) -> str:
        return f"{quantity(self._count, 'line')} that begin with # are left out" if self._count else ""


def _looks_numeric(cell: str) -> bool:
    return is_number(cell.replace(",", "."))


class _Rows:
    """The rows of a file, each checked as it is read: a block of far too wide rows would fill the memory.

    Empty cells beyond the last name are cut off, and those of names that are empty may be missing. A first row of units
    and empty rows at the end are left out.
    """

    def __init__(
        self, reader: Iterator[_NumberedRow], names: list[str], columns: TableColumns, class_names: tuple[str, ...]
    ) -> None:
        self._reader, self._names, self.columns = reader, names, columns
        self._class_names = class_names
        self.width = len(names)
        self.units = 0  # rows of units
        self._cut_rows = self._empty_rows = 0

    def __iter__(self) -> Iterator[_NumberedRow]:
        rows = (
            (line, self._row_of_table_width(number, line, row)) for number, (line, row) in enumerate(self._reader, 1)
        )
        first = next(rows, None)
        second = next(rows, None)
        if first is not None and second is not None and self._has_units(first[1]) and not self._has_units(second[1]):
            self.units = 1
            first = None
        empty_rows: list[_NumberedRow] = []
        for row in chain((row for row in (first, second) if row is not None), rows):
            if not any(map(str.strip, row[1])):
                empty_rows.append(row)
                if len(empty_rows) > _MAX_EMPTY_ROWS:
                    raise DataError("empty rows", expected=f"at most {_MAX_EMPTY_ROWS} together", got="more")
                continue
            yield from empty_rows
            empty_rows.clear()
            yield row
        self._empty_rows = len(empty_rows)

    def _row_of_table_width(self, number: int, line: int, row: list[str]) -> list[str]:
        if len(row) > self.width and not any(map(str.strip, row[self.width :])):
            self._cut_rows += 1
            return row[: self.width]
        if len(row) < self.width and not any(self._names[len(row) :]):
            return row + [""] * (self.width - len(row))
        if len(row) != self.width:
            hint = _WIDE_ROW_HINT if len(row) > self.width else ""
            raise DataError(f"row {number} (line {line})", expected=f"{self.width} columns", got=len(row), hint=hint)
        return row

    def _has_units(self, row: list[str]) -> bool:
        """Whether no cell of a row may be a number, a time or a class, but one of a column of numbers has a text."""
        texts = [row[i] for i in self.columns.inputs + self.columns.targets if not is_missing(row[i])]
        has_class = any(row[i].strip() in self._class_names for i in self.columns.classes)
        # A cell that begins as a number or a time does, or is a state, is no unit.
        may_be_numbers = (_NUMBER_BEGIN.match(cell) or cell.strip().lower() in _STATES for cell in row)
        return bool(texts) and not has_class and not any(may_be_numbers)

    @property
    def note(self) -> str:
        parts = [
            "the first row after the names has no numbers, as one of units, and is left out" if self.units else "",
            f"{quantity(self._empty_rows, 'empty row')} at the end are left out" if self._empty_rows else "",
            f"{quantity(self._cut_rows, 'row')} end in empty cells without a name, which are left out"
            if self._cut_rows
            else "",
        ]
        return "; ".join(filter(None, parts))


class _Decimals:
    """The decimal mark of a CSV file: a point or, as spreadsheets of many countries write it, a comma.

    A comma is a decimal mark unless it may as well separate thousands, or columns. Spaces within a number separate
    thousands.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._marks: set[str] = set()

    def __call__(self, column: list[str]) -> list[str]:
        """The cells with decimal points. Raises `DataError` if the file has both marks: one of them means thousands."""
        text = "\n".join(column)
        if any(space in text for space in _SPACES):
            column = [re.sub(rf"[{_SPACES}]", "", c) if _SPACED.fullmatch(c) else c for c in map(str.strip, column)]
        if "\u2212" in text:  # the minus sign of spreadsheets
            column = [cell.replace("\u2212", "-") for cell in column]
        if "." in text and any(_DECIMAL_POINT.fullmatch(cell.strip()) for cell in column):
            self._marks.add(".")
        commas = [cell.strip() for cell in column if "," in cell] if "," in text else []
        if commas and (self._delimiter == ";" or not all(map(_THOUSANDS.fullmatch, commas))):
            column = [cell if "." in cell else cell.replace(",", ".") for cell in column]
            if any(_DECIMAL_POINT.fullmatch(cell.replace(",", ".")) for cell in commas):
                self._marks.add(",")
        if len(self._marks) > 1:
            expected = "decimals after a point, or after a comma"
            raise DataError("numbers", expected=expected, got="both", hint=COMMAS_HINT)
        return column

    @property
    def note(self) -> str:
        return "decimals come after a comma" if "," in self._marks else ""


def _delimiter(names: str, row: str) -> str:
    """The character that occurs as often in the first row as in the second; otherwise the most frequent in the first.

    Quoted texts don't count. The comma comes last, because names and numbers contain it more often than the others.
    """
    counts = [tuple(_QUOTED.sub("", line).count(character) for line in (names, row)) for character in _DELIMITERS]
    regular = [character for character, (first, second) in zip(_DELIMITERS, counts, strict=True) if first == second > 0]
    return regular[0] if regular else max(reversed(_DELIMITERS), key=_QUOTED.sub("", names).count)


def _row_lines(lines: Iterator[str]) -> list[str]:
    """The lines of the next row that isn't empty: several if one of its quoted texts has line breaks."""
    lines_of_row = [next((line for line in lines if line.strip()), "")]
    is_open = bool(_OPENING_QUOTE.search(lines_of_row[0])) and lines_of_row[0].count('"') % 2 == 1
    length = len(lines_of_row[0])
    while is_open and length < _MAX_LINE_LENGTH and (next_line := next(lines, "")):
        lines_of_row.append(next_line)
        length += len(next_line)
        is_open ^= next_line.count('"') % 2 == 1
    return lines_of_row


def _row_text(lines: Sequence[str]) -> str:
    """A row as one text; only its first line if its last quotation mark is never closed."""
    text = "".join(lines)
    return lines[0] if text.count('"') % 2 else text


def _limited_lines(file: Any) -> Iterator[str]:
    while line := file.readline(_MAX_LINE_LENGTH):
        if len(line) == _MAX_LINE_LENGTH and not line.endswith("\n"):
            raise DataError("a line", expected=f"at most {_MAX_LINE_LENGTH} characters", got="more")
        yield line
