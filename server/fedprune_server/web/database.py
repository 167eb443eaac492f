"""The console's database: operators, sessions, orders and the audit log, in a SQLite file that only its owner can read.

The console's process, the server and `fedprune-server operators` write to it, each in short transactions.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprune.core.closeable import Closeable
from fedprune.core.disk import open_own_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune_server.storage.sqlite_file import FILE_BUSY_TIMEOUT_S, ReaderPool, SqliteFile, connect_reader

# In the state folder, next to the server's database: the console's process can open this one and nothing of the fleet.
CONSOLE_FILE = "console.db"

CONSOLE_VERSION = 1

# Lines of the audit log that are kept: some 150 MB. By number and not by time: a wrong clock must not delete any.
MAX_AUDIT_LINES = 500_000

_TABLES = """
CREATE TABLE IF NOT EXISTS operators (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, hash TEXT NOT NULL, made_at REAL NOT NULL, changed_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    token TEXT PRIMARY KEY, operator TEXT NOT NULL, csrf TEXT NOT NULL, address TEXT NOT NULL,
    made_at REAL NOT NULL, seen_at REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS sessions_by_operator ON sessions (operator);
CREATE TABLE IF NOT EXISTS throttle (
    key TEXT PRIMARY KEY, count INTEGER NOT NULL, at REAL NOT NULL, before REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, operator TEXT NOT NULL, address TEXT NOT NULL,
    action TEXT NOT NULL, what TEXT NOT NULL, outcome TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS orders (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, until REAL NOT NULL, operator TEXT NOT NULL,
    address TEXT NOT NULL, kind TEXT NOT NULL, what TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', ok INTEGER,
    text TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX IF NOT EXISTS orders_by_state ON orders (state, number);
CREATE INDEX IF NOT EXISTS audit_by_order ON audit (json_extract(what, '$.order'));
CREATE TRIGGER IF NOT EXISTS audit_stays
    BEFORE DELETE ON audit WHEN OLD.number > (SELECT max(number) FROM audit) - AUDIT_KEPT
    BEGIN SELECT RAISE(ABORT, 'the audit log is append only'); END;
CREATE TRIGGER IF NOT EXISTS audit_ends AFTER INSERT ON audit
    BEGIN DELETE FROM audit WHERE number <= NEW.number - AUDIT_KEPT; END;
CREATE TRIGGER IF NOT EXISTS audit_is BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append only'); END;
""".replace("AUDIT_KEPT", str(MAX_AUDIT_LINES))


class ConsoleDatabase(Closeable):
    """The database, created if it doesn't exist. Threads may share it: writers wait for each other, readers don't wait.

    Every method raises `StorageError` if the database is damaged, or the disk fails or is full; so does the constructor
    if other users may read it, or it is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(f"can't open {path}"):
            # Made with its mode, not changed to it: there is no moment in which others could open it.
            os.close(open_own_file(path, os.O_RDWR | os.O_CREAT))
            if path.stat().st_mode & 0o077:
                hint = f"See who may have read it, then: chmod 600 {path}"
                raise StorageError(f"{path} can be read by other users", hint=hint)
        hint = "If it is damaged, delete it and add the operators again."
        self._file = SqliteFile(path, _TABLES, CONSOLE_VERSION, hint, wal=True)
        self._connection = self._file.connection
        # Readers have connections of their own: on the one that waits to write they would wait, too.
        self._readers = ReaderPool(self._make_reader)
        self._connection.row_factory = sqlite3.Row
        self._write_lock = threading.RLock()
        self._writer_thread = 0

    def close(self) -> None:
        self._readers.close()
        self._connection.close()

    def _make_reader(self) -> sqlite3.Connection:
        reader = connect_reader(self.path)
        reader.row_factory = sqlite3.Row
        return reader

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        with self._file.errors():
            if self._writer_thread == threading.get_ident():  # within a transaction, whose changes it must see
                return [dict(r) for r in self._connection.execute(query, values)]
            return [dict(r) for r in self._readers.rows(query, values)]

    def row(self, query: str, *values: object) -> dict[str, Any] | None:
        """The first row of a query."""
        rows = self.rows(query, *values)
        return rows[0] if rows else None

    def execute(self, query: str, *values: object) -> int:
        """Execute a statement; returns the number of affected rows."""
        with self._write_lock, self._file.errors():
            return self._connection.execute(query, values).rowcount

    def try_execute(self, *statements: tuple[str, tuple[object, ...]]) -> bool:
        """Execute statements in a transaction, unless another process is writing. Returns whether they were executed.

        For writes that may be skipped, so that no request of a browser waits for another process's transaction.
        """
        if not self._write_lock.acquire(blocking=False):
            return False
        try:
            with self._file.errors():
                self._connection.execute("PRAGMA busy_timeout=0")
                try:
                    self._connection.execute("BEGIN IMMEDIATE")  # takes the lock now, or fails at once
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error):
                        raise
                    return False
                finally:
                    self._connection.execute(f"PRAGMA busy_timeout={int(1000 * FILE_BUSY_TIMEOUT_S)}")
                with self._connection:  # which commits, or rolls back where SQLite hasn't done so itself
                    for query, values in statements:
                        self._connection.execute(query, values)
            return True
        finally:
            self._write_lock.release()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._write_lock, self._file.errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._writer_thread = threading.get_ident()
            try:
                yield
            finally:
                self._writer_thread = 0
