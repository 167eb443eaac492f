"""The format of the database's tables: new databases are made in it, and those of another format are refused."""

from __future__ import annotations

import sqlalchemy as sql

from fedprune.core.errors import StorageError
from fedprune_server.storage.tables import META, TABLES, put_meta, read_meta

FORMAT = "fedprune.database/2"

# Row of `meta` with the format of the tables.
_FORMAT_ROW = "format"


def has_tables(connection: sql.Connection, url: str) -> bool:
    """Whether the tables are there; False for an empty database. Raises `StorageError` for another version's."""
    if not sql.inspect(connection).has_table(META.name):
        return False
    stored_format = read_meta(connection, _FORMAT_ROW)
    if stored_format != FORMAT:
        raise StorageError(
            f"{url} is of another version",
            expected=FORMAT,
            got=stored_format or "none",
            hint="Run the version of fedprune that made it, or begin with a new state folder and an empty database.",
        )
    return True


def make_tables(connection: sql.Connection) -> None:
    """Make the tables of an empty database, in the transaction of the caller."""
    TABLES.create_all(connection, checkfirst=False)  # tables of that name are another program's
    put_meta(connection, _FORMAT_ROW, FORMAT)
