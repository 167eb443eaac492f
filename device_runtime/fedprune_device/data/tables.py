"""The rows of CSV and Parquet files, a few at a time."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError, FedpruneError, MissingExtraError, error_reason
from fedprune.core.text import encoding_of
from fedprune.core.zip_limits import MAX_INFLATED_BYTES, MAX_INFLATION

CSV, PARQUET = ".csv", ".parquet"

CLASS = "class"  # the column of classes
CLASSES = (CLASS, "label")  # its names, in any case
TARGET = "target"  # what names of columns to predict begin with, in any case
SKIPPED = ("", "time", "timestamp", "date", "datetime")  # names of columns with times, or with the rows' numbers

_INDEX = re.compile(r"unnamed: 0|__index_level_\d+__")  # an index without a name, as pandas writes it

_MAX_COLUMNS = 4096
_MAX_LINE_LENGTH = 2**20  # characters; without a limit a file without line breaks would be read as a whole
_MAX_ROUNDING = 1.0  # of a number in float32; seconds since 1970, and keys of databases, change by more
_BLOCK_CELLS = 2**14  # cells of a file that are held at once: as a Python string each takes some 60 bytes
_BUFFER_BYTES = 2**16  # bytes of a column of a Parquet file that are read at once; otherwise all of a row group are

_DELIMITERS = ";\t|,"
_DELIMITER_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # a first line that tells Excel the delimiter
_OPENING_QUOTE = re.compile(r'(?<![^;\t|,]) *"')  # a cell: within one a quote is a character, as of inches
_QUOTED = re.compile(_OPENING_QUOTE.pattern + r'[^"]*(?:""[^"]*)*"')

_DECIMAL_POINT = re.compile(r"[+-]?\d*\.\d+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d{1,2}:\d{2}")
_TRUTH = {"true": "1", "false": "0"}
_EMPTY = ("", "na", "n/a", "#n/a", "nan", "null", "none", "-", "?")  # what programs write for a missing number

_CONVERT_HINT = "A net takes numbers: write them as such"
_TIMES_HINT = (
    f"{_CONVERT_HINT}, for example the hour of the day. A column that tells when a row was measured is skipped if it "
    f"is called {SKIPPED[1]}."
)
_COMMAS_HINT = "Write numbers with a point before the decimals and nothing between thousands."
_LARGE_HINT = (
    "Scale the column, as a net takes small numbers, such as value / 1e6. A column that tells when a row was measured "
    f"is skipped if it is called {SKIPPED[1]}."
)
_GAPS_HINT = "Fill the gaps, or leave such rows out."
_TEXTS_HINT = f"{_CONVERT_HINT}, call the column {CLASS} if it has the classes, or leave it out."
_NAMES_HINT = "Give the classes' names in the order that all boards share: --class-names A,B,C."


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table by their role, each as its place in the file: the order in which rows are stored."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> TableColumns:
        """Raises `DataError` if names are missing, twice there, or there are too many."""
        lower_names = [name.lower() for name in names]
        used_columns = [i for i, name in enumerate(lower_names) if name not in SKIPPED and not _INDEX.fullmatch(name)]
        if len(names) > _MAX_COLUMNS:
            raise DataError("columns", expected=f"at most {_MAX_COLUMNS}", got=len(names))
        for column in used_columns:
            if (first := names.index(names[column])) != column:
                raise DataError(
                    "names of columns",
                    expected="different ones",
                    got=f"that of column {first + 1} for {column + 1}, too",
                )
        if used_columns and all(_is_number(names[column].replace(",", ".")) for column in used_columns):
            raise DataError("the first row", expected="names of columns", got="numbers")
        classes = tuple(column for column in used_columns if lower_names[column] in CLASSES)
        if len(classes) > 1:
            column_texts = " and ".join(str(column + 1) for column in classes)
            hint = f"The others are inputs under another name, or left out: the one is called {CLASS}."
            raise DataError("columns of classes", expected="one", got=f"columns {column_texts}", hint=hint)
        targets = tuple(column for column in used_columns if lower_names[column].startswith(TARGET))
        inputs = tuple(column for column in used_columns if column not in targets + classes)
        if not inputs:
            raise DataError("columns", expected="some of numbers to read", got="none")
        return cls(inputs, targets, classes)

    @property
    def all(self) -> tuple[int, ...]:
        return self.inputs + self.targets + self.classes


_OpenTable = tuple[TableColumns, Iterator[npt.NDArray[np.float32]]]


@contextmanager
def open_table(path: Path, class_names: tuple[str, ...]) -> Iterator[_OpenTable]:
    """The columns of a file, and its rows [n, columns] in parts.

    Classes are numbers, names that are in `class_names` as their place there. Raises `DataError`, which names the file
    and the row, `StorageError` if the file can't be read, `MissingExtraError` for Parquet without pyarrow.
    """
    try:
        with storage_errors(f"can't read {path}"):
            if path.suffix.lower() == PARQUET:
                with _open_parquet(path, class_names) as table:
                    yield table
            else:
                with path.open(encoding=_encoding(path), newline="") as file:
                    yield _open_csv(file, class_names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (UnicodeError, csv.Error) as error:
        hint = "Save it as CSV UTF-8." if isinstance(error, UnicodeError) else ""
        raise DataError(f"{path} is no table", expected="CSV in UTF-8", got=error_reason(error), hint=hint) from error


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return encoding_of(file.read(2))


def _open_csv(file: Any, class_names: tuple[str, ...]) -> _OpenTable:
    lines = _limited_lines(file)
    first = _row_lines(lines)
    delimiter_line = _DELIMITER_LINE.fullmatch(first[0].strip())
    head = [_row_lines(lines), _row_lines(lines)] if delimiter_line else [first, _row_lines(lines)]
    delimiter = delimiter_line[1] if delimiter_line else _delimiter(*map(_row_text, head))
    reader = csv.reader(chain(*head, lines), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader, [])]
    columns, decimals = TableColumns.of(names), _Decimals(delimiter)

    def block(rows: list[list[str]], begin: int) -> npt.NDArray[np.float32]:
        return _rows_of_cells(columns, [[row[p] for row in rows] for p in columns.all], begin, class_names, decimals)

    def parts() -> Iterator[npt.NDArray[np.float32]]:
        rows: list[list[str]] = []
        begin = 1
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                hint = f"The first row has the names of all columns. {_COMMAS_HINT}" if len(row) > len(names) else ""
                raise DataError(f"row {begin + len(rows)}", expected=f"{len(names)} columns", got=len(row), hint=hint)
            rows.append(row)
            if len(rows) * len(names) >= _BLOCK_CELLS:
                yield block(rows, begin)
                begin += len(rows)
                rows = []
        if rows:
            yield block(rows, begin)

    return columns, parts()


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
            raise DataError("numbers", expected=expected, got="both", hint=_COMMAS_HINT)
        return column


def _delimiter(names: str, row: str) -> str:
    """The character that occurs as often in the first row as in the second, or else the most frequent in the first.

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


def _row_text(record: Sequence[str]) -> str:
    """A row as one text; only its first line if its last quotation mark is never closed."""
    text = "".join(record)
    return record[0] if text.count('"') % 2 else text


def _limited_lines(file: Any) -> Iterator[str]:
    while line := file.readline(_MAX_LINE_LENGTH):
        if len(line) == _MAX_LINE_LENGTH and not line.endswith("\n"):
            raise DataError("a line", expected=f"at most {_MAX_LINE_LENGTH} characters", got="more")
        yield line


def _check_unpacked(metadata: Any, packed: int, columns: int) -> None:
    """Refuse a Parquet file that would unpack to far more than its size: a few bytes can hold a billion equal rows."""
    groups = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    unpacked = max(groups, 4 * columns * metadata.num_rows)
    if unpacked > max(MAX_INFLATED_BYTES, MAX_INFLATION * packed):
        raise DataError(
            "size when it is unpacked",
            expected=f"at most {MAX_INFLATED_BYTES} bytes, or {MAX_INFLATION} times what it takes in the file",
            got=unpacked,
        )


@contextmanager
def _open_parquet(path: Path, class_names: tuple[str, ...]) -> Iterator[_OpenTable]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise MissingExtraError("Parquet files need pyarrow", extra="parquet") from error

    def parts() -> Iterator[npt.NDArray[np.float32]]:
        begin, column_names = 1, [names[place] for place in columns.all]
        try:
            for batch in file.iter_batches(max(1, _BLOCK_CELLS // len(column_names)), columns=column_names):
                cells = [_column_cells(batch.column(name)) for name in column_names]
                yield _rows_of_cells(columns, cells, begin, class_names)
                begin += len(batch)
        except OSError as error:
            if error.errno is not None:
                raise
            # What pyarrow can't unpack.
            raise DataError("no table", expected="Parquet", got=error_reason(error)) from error

    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = TableColumns.of([name.strip() for name in names])
            _check_types(file.schema_arrow, columns)
            _check_unpacked(file.metadata, path.stat().st_size, len(columns.all))
            yield columns, parts()
    except (FedpruneError, OSError):
        raise
    except (ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise DataError("no table", expected="Parquet", got=error_reason(error)) from error


def _check_types(schema: Any, columns: TableColumns) -> None:
    """Refuse columns of a Parquet file that are neither numbers nor texts.

    The message may be sent to the server, so that it has no name of a column.
    """
    from pyarrow import types

    for place in columns.all:
        kind = schema.field(place).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        accepted_types = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
        if any(test(kind) for test in accepted_types) or str(kind) in ("string", "large_string", "string_view"):
            continue
        name = re.split(r"\W", str(kind))[0]
        expected = "classes, as whole numbers or texts" if place in columns.classes else "numbers"
        hint = f"{_CONVERT_HINT}, each in a column of its own, or leave them out."
        hint = _TIMES_HINT if types.is_temporal(kind) else hint
        raise DataError(f"type of column {place + 1}", expected=expected, got=name, hint=hint)


def _column_cells(column: Any) -> Any:
    """The cells of a Parquet file's column: numbers, or texts, and None where one is empty."""
    from pyarrow import float64, types

    column = column.dictionary_decode() if types.is_dictionary(column.type) else column
    if types.is_boolean(column.type) or types.is_decimal(column.type):
        column = column.cast(float64(), safe=False)  # true is 1
    return column.to_pylist() if column.null_count else column.to_numpy(zero_copy_only=False)


def _rows_of_cells(
    columns: TableColumns,
    cells: Sequence[Any],
    begin: int,
    class_names: tuple[str, ...],
    decimals: Callable[[list[str]], list[str]] | None = None,
) -> npt.NDArray[np.float32]:
    """Cells by column as rows of numbers; `begin` is the number of the first row."""
    out = np.empty((len(cells[0]), len(cells)), np.float32)
    for number, (place, column) in enumerate(zip(columns.all, cells, strict=True)):
        classes = place in columns.classes
        numbers = _class_numbers(column, class_names) if classes else column if decimals is None else decimals(column)
        values = _cell_numbers(numbers)
        with np.errstate(all="ignore"):
            out[:, number] = values
            is_valid = np.isfinite(out[:, number]) & (np.abs(out[:, number] - values) < _MAX_ROUNDING)
            is_valid &= not classes or ((values >= 0) & (values < 2**24) & (values % 1 == 0))
        if not is_valid.all():
            first_bad = int(np.argmin(is_valid))
            names_only = begin + first_bad == 1 and not any(_is_number(column[0]) for column in cells)
            where = f"row {begin + first_bad}, column {place + 1}"
            raise _refusal(where, column[first_bad], class_names, is_class=classes, names_only=names_only)
    return out


def _refusal(where: str, cell: Any, class_names: tuple[str, ...], *, is_class: bool, names_only: bool) -> DataError:
    """The error of a refused cell, with a hint that loses no data. `names_only`: the first row has no number.

    The message may be sent to the server: it doesn't quote the cell.
    """
    cell = cell.strip().lower() if isinstance(cell, str) else cell
    got, hint = "something else", _TEXTS_HINT
    if cell is None or cell != cell or cell in _EMPTY:  # NaN is unequal to itself
        got, hint = "an empty cell", _GAPS_HINT
    elif is_class:
        hint = _NAMES_HINT
    elif _is_number(cell):
        got, hint = "one that changes in float32", _LARGE_HINT
    elif not isinstance(cell, str):
        hint = _GAPS_HINT
    elif _DATE.match(cell):
        hint = _TIMES_HINT
    elif "," in cell and any(map(str.isdigit, cell)):
        hint = _COMMAS_HINT
    elif names_only:
        hint = "Names of columns are one row: leave a second one, such as of units, out."
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
        return np.array([_cell_number(cell) for cell in cells], np.float64)


def _cell_number(cell: Any) -> float:
    if isinstance(cell, str):
        cell = _TRUTH.get(cell.strip().lower(), cell)
    return float(cell) if _is_number(cell) else np.nan


def _class_numbers(column: Any, class_names: tuple[str, ...]) -> list[Any]:
    numbers = {name: number for number, name in enumerate(class_names)}
    cells = (cell.strip() if isinstance(cell, str) else cell for cell in column)
    return [numbers.get(cell, cell) for cell in cells]


def _is_number(cell: Any) -> bool:
    try:
        return bool(np.isfinite(float(cell))) and not (isinstance(cell, str) and "_" in cell)
    except (ValueError, TypeError, OverflowError):
        return False
