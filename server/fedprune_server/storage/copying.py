"""Copies the rows of a database, as they are at one moment, to another database of whichever kind."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sql

from fedprune.core.errors import ConfigError
from fedprune_server.storage.database import COMMIT_ROW, Database, copy_sqlite, translate_errors
from fedprune_server.storage.lease import DATABASE_ID_ROW, LEASE_ROW
from fedprune_server.storage.storage import Storage
from fedprune_server.storage.tables import ANSWERS, EVENTS, META, ROLLOUTS, TABLES, put_meta, read_meta

# Row of `meta`: digest of the backup with which a database was filled.
RESTORED_ROW = "restored"

# Rows of `meta` that belong to one database and its server, not to the job, and so are not copied.
_OWN_ROWS = (COMMIT_ROW, LEASE_ROW, DATABASE_ID_ROW)

# Rows that are read and written together: a large table is more than memory should hold.
_BATCH_ROWS = 500


def write_snapshot(storage: Storage, target: Path) -> None:
    """Write the present content of a database to a new SQLite file, while others may be writing to the database."""
    if storage.database.file is not None:
        copy_sqlite(storage.database.file, target)
    else:
        with Storage(f"sqlite:///{target}") as copy:
            _copy_rows(storage.database, copy.database)
    engine = sql.create_engine(f"sqlite:///{target}")
    try:
        with translate_errors(str(target)), engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=DELETE")  # one file
            connection.execute(META.delete().where(META.c.key.in_((*_OWN_ROWS, RESTORED_ROW))))
    finally:
        engine.dispose()


def fill_database(url: str, source: Path, digest: str) -> None:
    """Fill an empty database, in one transaction, with the rows of a file that `write_snapshot` wrote.

    A database that was filled from the backup with this digest is left as it is. Raises `ConfigError` if the database
    holds a job.
    """
    with Storage(url) as storage, Storage(f"sqlite:///{source}") as copy:
        with storage.database.read_transaction() as connection:
            filled = read_meta(connection, RESTORED_ROW)
        if filled == digest:
            return
        if storage.settings() is not None or storage.load() is not None:
            raise ConfigError(f"{storage.url} holds a job already", hint="Name an empty database.")
        _copy_rows(copy.database, storage.database, {RESTORED_ROW: digest})


def _copy_rows(source: Database, target: Database, extra_rows: dict[str, str] | None = None) -> None:
    """Replace all rows of a database by those of another one, each as of one moment."""
    with translate_errors(target.url), source.engine.connect() as reader, target.engine.connect() as writer:
        if source.postgresql:  # all tables as of one moment, which SQLite's transactions give by default
            reader = reader.execution_options(isolation_level="REPEATABLE READ")
        with reader.begin(), writer.begin():
            for table in TABLES.sorted_tables:
                writer.execute(table.delete())
                rows = reader.execution_options(yield_per=_BATCH_ROWS).execute(sql.select(table))
                for batch in rows.mappings().partitions(_BATCH_ROWS):
                    copied_rows = [dict(row) for row in batch if table is not META or row["key"] not in _OWN_ROWS]
                    if copied_rows:
                        writer.execute(table.insert(), copied_rows)
            for key, value in (extra_rows or {}).items():
                put_meta(writer, key, value)
            if target.postgresql:
                put_meta(writer, COMMIT_ROW, "")
                # Rows came with their numbers; PostgreSQL would otherwise begin to count at 1 and meet them.
                for table in (EVENTS, ROLLOUTS, ANSWERS):
                    last_number = writer.execute(sql.select(sql.func.max(table.c.number))).scalar()
                    if last_number is not None:
                        query = f"SELECT setval(pg_get_serial_sequence('{table.name}', 'number'), :last)"  # nosec B608  # ours
                        writer.execute(sql.text(query), {"last": last_number})
