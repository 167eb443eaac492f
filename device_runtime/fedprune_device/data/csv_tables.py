"""Reads CSV files in blocks of rows, with the delimiters and decimal marks of spreadsheets in many countries."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune_device.data.table_cells import BLOCK_CELLS, COMMAS_HINT, rows_of_cells
from fedprune_device.data.table_columns import OpenTable, TableColumns

_MAX_LINE_LENGTH = 2**20  # characters; without a limit a file without line breaks would be read as a whole
_DELIMITERS = ";\t|,"
_DELIMITER_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # a first line that tells Excel the delimiter
_OPENING_QUOTE = re.compile(r'(?<![^;\t|,]) *"')  # a cell: within one a quote is a character, as of inches
_QUOTED = re.compile(_OPENING_QUOTE.pattern + r'[^"]*(?:""[^"]*)*"')
_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")


def open_csv(file: Any, class_names: tuple[str, ...]) -> OpenTable:
    """Read the names of the columns, and return the rows as an iterator."""
    lines = _limited_lines(file)
    first_row = _row_lines(lines)
    delimiter_line = _DELIMITER_LINE.fullmatch(first_row[0].strip())
    head = [_row_lines(lines) if delimiter_line else first_row, _row_lines(lines)]
    delimiter = delimiter_line[1] if delimiter_line else _delimiter(*map(_row_text, head))
    reader = csv.reader(chain(*head, lines), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader, [])]
    columns = TableColumns.of(names)
    return columns, _blocks(reader, columns, len(names), class_names, _Decimals(delimiter))


def _blocks(
    reader: Iterator[list[str]], columns: TableColumns, width: int, class_names: tuple[str, ...], decimals: _Decimals
) -> Iterator[npt.NDArray[np.float32]]:
    """The rows of a file with `width` columns, in blocks of `BLOCK_CELLS` cells."""
    number = 1
    rows = _full_rows(reader, width)
    while block := list(islice(rows, -(-BLOCK_CELLS // width))):
        cells = [[row[position] for row in block] for position in columns.all]
        yield rows_of_cells(columns, cells, number, class_names, decimals)
        number += len(block)


def _full_rows(reader: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    """The rows that aren't empty, each checked as it is read: a block of far too wide rows would fill the memory."""
    for number, row in enumerate(filter(None, reader), 1):
        if len(row) != width:
            hint = f"The first row has the names of all columns. {COMMAS_HINT}" if len(row) > width else ""
            raise DataError(f"row {number}", expected=f"{width} columns", got=len(row), hint=hint)
        yield row


class _Decimals:
    """The decimal mark of a CSV file: a point or, as spreadsheets of many countries write it, a comma.

    If another character separates the columns, a comma is a decimal mark unless it may as well separate thousands.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._marks: set[str] = set()

    def __call__(self, column: list[str]) -> list[str]:
        """The cells with decimal points. Raises `DataError` if the file has both marks: one of them means thousands."""
        text = "\n".join(column)
        if "." in text and any(_DECIMAL_POINT.fullmatch(cell.strip()) for cell in column):
            self._marks.add(".")
        commas = [cell.strip() for cell in column if "," in cell] if "," in text and self._delimiter != "," else []
        if commas and (self._delimiter == ";" or not all(map(_THOUSANDS.fullmatch, commas))):
            column = [cell if "." in cell else cell.replace(",", ".") for cell in column]
            if any(_DECIMAL_POINT.fullmatch(cell.replace(",", ".")) for cell in commas):
                self._marks.add(",")
        if len(self._marks) > 1:
            expected = "decimals after a point, or after a comma"
            raise DataError("numbers", expected=expected, got="both", hint=COMMAS_HINT)
        return column


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
