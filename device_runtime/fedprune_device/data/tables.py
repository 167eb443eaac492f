"""Opens a CSV or Parquet file as a table: its columns, and its rows in blocks, so that a large file takes no memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.disk import open_file, storage_errors
from fedprune.core.errors import DataError, error_reason
from fedprune.core.text import encoding_of
from fedprune_device.data.csv_tables import open_csv
from fedprune_device.data.parquet_tables import open_parquet
from fedprune_device.data.table_columns import OpenTable
from fedprune_device.data.table_options import TableOptions

CSV, PARQUET = (".csv", ".tsv"), ".parquet"

_DEFAULTS = TableOptions()


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
