"""Reads Parquet files in blocks of rows, by pyarrow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprune.core.errors import DataError, FedpruneError, MissingExtraError, error_reason
from fedprune.core.zip_limits import MAX_INFLATED_BYTES, MAX_INFLATION
from fedprune_device.data.table_cells import BLOCK_CELLS, CONVERT_HINT, TIMES_HINT, RowPlaces, rows_of_cells
from fedprune_device.data.table_columns import DATE, MOMENT, TIME, OpenTable, TableBlock, TableColumns
from fedprune_device.data.table_options import TableOptions
from fedprune_device.data.table_times import TimeReader

_BUFFER_BYTES = 2**16  # bytes of a column of a Parquet file that are read at once; otherwise all of a row group are


@contextmanager
def open_parquet(path: Path, class_names: tuple[str, ...], options: TableOptions) -> Iterator[OpenTable]:
    """Read the columns of a file, and return its rows as an iterator, which reads while the context is open."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
        from pyarrow.types import is_date, is_temporal, is_time, is_timestamp
    except ModuleNotFoundError as error:
        raise MissingExtraError("Parquet files need pyarrow", extra="parquet") from error

    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            kinds = file.schema_arrow.types
            tests = {MOMENT: is_timestamp, DATE: is_date, TIME: is_time}
            time_kinds = {i: name for i, kind in enumerate(kinds) for name, test in tests.items() if test(kind)}
            columns = TableColumns.of([name.strip() for name in file.schema_arrow.names], time_kinds, options.columns)
            _check_types(file.schema_arrow, columns)
            _check_unpacked(file.metadata, path.stat().st_size, len(columns.read))
            index = columns.index if columns.index is None or not is_temporal(kinds[columns.index]) else None
            times = TimeReader(columns.times, index)
            blocks = _blocks(file, columns, class_names, times, allows_missing=options.allows_missing)
            yield OpenTable(columns, blocks, lambda: [times.note] if times.note else [])
    except (FedpruneError, OSError):
        raise
    except (ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise DataError("no table", expected="Parquet", got=error_reason(error)) from error


def _blocks(
    file: Any, columns: TableColumns, class_names: tuple[str, ...], times: TimeReader, *, allows_missing: bool
) -> Iterator[TableBlock]:
    number, names = 1, file.schema_arrow.names
    try:
        for batch in file.iter_batches(
            max(1, BLOCK_CELLS // len(columns.read)), columns=[names[i] for i in columns.read]
        ):
            cells = [_column_cells(batch.column(names[i])) for i in columns.all]
            numbers = rows_of_cells(columns, cells, RowPlaces(number), class_names, allows_missing=allows_missing)
            time_columns = {i: _time_cells(batch.column(names[i])) for i in columns.read if i not in columns.all}
            yield TableBlock(numbers, times(time_columns, RowPlaces(number)))
            number += len(batch)
    except OSError as error:
        # pyarrow raises this without an errno for data that it can't unpack.
        if error.errno is not None:
            raise
        raise DataError("no table", expected="Parquet", got=error_reason(error)) from error


def _check_unpacked(metadata: Any, packed: int, columns: int) -> None:
    """Refuse a file that would unpack to far more than its size: a few bytes can hold a billion equal rows."""
    groups = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    unpacked = max(groups, 4 * columns * metadata.num_rows)
    if unpacked > max(MAX_INFLATED_BYTES, MAX_INFLATION * packed):
        expected = f"at most {MAX_INFLATED_BYTES} bytes, or {MAX_INFLATION} times what it takes in the file"
        raise DataError("size when it is unpacked", expected=expected, got=unpacked)


def _check_types(schema: Any, columns: TableColumns) -> None:
    """Refuse columns that are neither numbers nor texts. The server may get the message: it names no column."""
    from pyarrow import types

    is_accepted = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
    for i in columns.all:
        kind = schema.field(i).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if any(test(kind) for test in is_accepted) or str(kind) in ("string", "large_string", "string_view"):
            continue
        name = re.split(r"\W", str(kind))[0]
        expected = "classes, as whole numbers or texts" if i in columns.classes else "numbers"
        hint = f"{CONVERT_HINT}, each in a column of its own, or leave them out."
        hint = TIMES_HINT if types.is_temporal(kind) else hint
        raise DataError(f"type of column {i + 1}", expected=expected, got=name, hint=hint)


def _column_cells(column: Any) -> Any:
    """The cells of a Parquet file's column: numbers, or texts, and None where one is empty."""
    from pyarrow import float64, types

    column = column.dictionary_decode() if types.is_dictionary(column.type) else column
    if types.is_boolean(column.type) or types.is_decimal(column.type):
        column = column.cast(float64(), safe=False)  # true is 1
    return column.to_pylist() if column.null_count else column.to_numpy(zero_copy_only=False)


def _time_cells(column: Any) -> list[Any]:
    """The cells of a column of times: seconds, or what the file has where it isn't a type of times."""
    from pyarrow import int64, types

    kind = column.type
    if not (types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind)):
        return list(column.to_pylist())
    if types.is_date32(kind):
        numbers, factor = column.cast("int32").cast(int64()), 86_400.0
    elif types.is_date64(kind):
        numbers, factor = column.cast(int64()), 1e-3
    else:
        numbers = column.cast("int32").cast(int64()) if types.is_time32(kind) else column.cast(int64())
        factor = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[kind.unit]
    return [None if n is None else n * factor for n in numbers.to_pylist()]
