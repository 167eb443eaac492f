"""Connections to a SQLite database: how long they wait for locks, and what makes a commit durable."""

from __future__ import annotations

import os
import sqlite3
import urllib.parse
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from fedprune.core.errors import StorageError
from fedprune_server.storage.sqlite_file import execute_when_unlocked

# Seconds for which SQLite itself waits for a lock. Between two such waits the waiting thread shows that it is alive.
SQLITE_RETRY_S = 1.0

# Option of connections whose transactions only read.
READS_OPTION = "fedprune_reads"


def sqlite_engine(url: sql.URL, *, read_only: bool) -> sql.Engine:
    """The connections of a database file, each with SQLite's own settings for locks and durability."""
    if read_only:
        return _read_only_engine(url)
    engine = sql.create_engine(url)
    sql.event.listen(engine, "connect", _tune_sqlite)
    sql.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _read_only_engine(url: sql.URL) -> sql.Engine:
    path = Path(url.database or "")

    def connect() -> sqlite3.Connection:
        uri = read_only_uri(path)
        return sqlite3.connect(uri, uri=True, timeout=SQLITE_RETRY_S, check_same_thread=False, isolation_level=None)

    engine = sql.create_engine(url, creator=connect).execution_options(**{READS_OPTION: True})
    sql.event.listen(engine, "begin", _begin_sqlite)
    return engine


def read_only_uri(path: Path) -> str:
    """The URI for reading a file, also on a read-only disk. Raises `StorageError` if changes would be missed."""
    # Undo a transaction that a crash cut off before the file was switched to a log (WAL): a reader can't undo it.
    if path.with_name(path.name + "-journal").exists() and os.access(path, os.W_OK, effective_ids=True):
        with suppress(sqlite3.Error), closing(sqlite3.connect(path, timeout=SQLITE_RETRY_S)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    uri = f"file:{urllib.parse.quote(str(path))}?mode=ro"
    log, index = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
    if os.access(path.parent, os.W_OK, effective_ids=True) or not path.exists() or (log.exists() and index.exists()):
        return uri
    if log.exists() and log.stat().st_size:
        raise StorageError(
            f"{path}: {index.name} is missing, which can't be made in a folder that can't be written to",
            hint="Copy the state folder to where it can be written to, and look there.",
        )
    # Without `immutable` SQLite would create the log and its index. It is right here: without a log no process has the
    # file open.
    return f"{uri}&immutable=1"


def _tune_sqlite(connection: sqlite3.Connection, record: object) -> None:
    # Python's module begins no transaction before changes of the schema, so `_begin_sqlite` begins them all.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={int(SQLITE_RETRY_S * 1000)}")
    # FULL: a commit is on the disk, not only in the system's cache, before anything that follows from it is done.
    for line in ("journal_mode=WAL", "synchronous=FULL"):
        execute_when_unlocked(connection, f"PRAGMA {line}")


def _begin_sqlite(connection: sql.Connection) -> None:
    opened: Any = connection.connection.dbapi_connection
    if connection.get_execution_options().get(READS_OPTION):
        # The first statement that reads takes the snapshot. Later ones of the transaction need no lock.
        execute_when_unlocked(opened, "BEGIN", "SELECT 1 FROM sqlite_master LIMIT 1")
    else:
        # With the write lock at once: a transaction that asks for it later is refused if another one has written
        # meanwhile.
        execute_when_unlocked(opened, "BEGIN IMMEDIATE")
