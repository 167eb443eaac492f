"""Names a table's columns in errors that stay on the board. What the server may get says only their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedprune.core.errors import DataError
from fedprune.core.text import first_few
from fedprune_device.data.table_columns import ColumnsError

_MAX_NAMES = 30


@contextmanager
def name_columns() -> Iterator[None]:
    """Add the names of a table's columns to errors about them. Only for commands whose errors nobody else reads."""
    try:
        yield
    except DataError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ColumnsError):
            cause = cause.__cause__
        if cause is None:
            raise
        hint = f"The table has: {first_few(cause.names, max_names=_MAX_NAMES)}."
        raise DataError(str(error), hint=hint) from error
