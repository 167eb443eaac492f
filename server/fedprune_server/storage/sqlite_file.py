"""A small SQLite file for the console's data and boards' crashes, and waits for locks of any SQLite database."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core.closeable import Closeable
from fedprune.core.disk import open_own_file, storage_errors
from fedprune.core.errors import BusyError, StorageError, StorageFullError
from fedprune.core.lock_holders import file_lock_holders
from fedprune.core.lock_wait import LockWait

_Result = TypeVar("_Result")

# Seconds for which SQLite waits for another process's lock. Writers wait for each other. Readers of a file without a
# log (WAL) wait for a writer's commit; with a log, only while another process recovers it after a crash, or deletes it
# when it closes the file. All this takes milliseconds, or as long as one fsync on a slow disk.
FILE_BUSY_TIMEOUT_S = 10.0

# The same for files that the server's loop writes: boards wait for the loop, and data that can't be written now is
# written in a later turn, or sent again.
LOOP_BUSY_TIMEOUT_S = 0.2

_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.02, 0.1


class SqliteFile(Closeable):
    """A SQLite file that only its owner can read, created if it doesn't exist.

    Its methods raise `StorageError` if it is damaged, or the disk fails or is full.

    Args:
        tables: Statements that make its tables if they don't exist.
        version: Version of its tables; a file of another version is refused.
        hint: Advice for a damaged file.
        wal: Whether readers don't wait for writers.
        busy_timeout_s: Seconds for which a statement that writes waits for another process.
    """

    def __init__(
        self,
        path: Path,
        tables: str,
        version: int,
        hint: str,
        *,
        wal: bool = False,
        busy_timeout_s: float = FILE_BUSY_TIMEOUT_S,
    ) -> None:
        self.path, self._hint = path, hint
        with self.errors(), storage_errors(f"can't use {path}"):
            # Created with this mode, not changed to it later: at no moment could others open it.
            os.close(open_own_file(path, os.O_RDWR | os.O_CREAT))
            self.connection = _connect(path, "rw", busy_timeout_s)
            try:
                if wal:
                    execute_when_unlocked(self.connection, "PRAGMA journal_mode=WAL")
                execute_when_unlocked(self.connection, "PRAGMA synchronous=FULL")
                stored_version = execute_when_unlocked(self.connection, "PRAGMA user_version")[0]
                if stored_version not in (0, version):
                    raise StorageError(f"{path} is of another version", expected=version, got=stored_version, hint=hint)
                if not stored_version:
                    script = f"BEGIN IMMEDIATE; {tables}; PRAGMA user_version={version}; COMMIT"
                    _retry_while_locked(self.connection, lambda: self.connection.executescript(script))
            except BaseException:
                self.connection.close()
                raise

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self.errors(), self.connection as connection:  # which commits, or rolls back
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def errors(self) -> Iterator[None]:
        with sqlite_errors(self.path, self._hint):
            yield


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads. Any thread may use it, one at a time. Raises `sqlite3.Error`."""
    return _connect(path, "ro", FILE_BUSY_TIMEOUT_S)


def _connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)


@contextmanager
def sqlite_errors(path: Path, hint: str) -> Iterator[None]:
    """Turn errors of SQLite into `StorageError`, with a hint for a damaged file, and `StorageFullError`."""
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFullError(f"no room left for {path}", hint="Make room on the disk.") from error
        if is_sqlite_locked(error):
            holders = " and ".join(sqlite_lock_holders(path)) or "another process"
            raise BusyError(f"{path} is locked by {holders}", hint="Wait until it is done, or end it.") from error
        raise StorageError(f"{path}: {error}", hint=hint) from error


class ReaderPool(Closeable):
    """Connections of one database that only read, so that no thread waits for another one's query. `connect` makes
    them, as many as there have been queries at a time."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._free: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Close the connections; none may be in use."""
        while self._free:
            self._free.pop().close()

    def rows(self, query: str, values: Sequence[object] = ()) -> list[Any]:
        """All rows of a query. Raises `sqlite3.Error`."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = self._connect()
        try:
            return connection.execute(query, values).fetchall()
        finally:
            self._free.append(connection)


def write_lock_holders(path: Path, patience_s: float) -> list[str]:
    """The processes that have held a database's write lock for this long, as far as the kernel knows; empty if it is
    free. Only for a database that another process has open: then opening it creates no files beside it. Raises
    `sqlite3.Error` if it can't be opened.
    """
    uri = f"{path.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=patience_s, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not is_sqlite_locked(error):
                raise
            return sqlite_lock_holders(path) or ["another process"]
        connection.execute("ROLLBACK")
    return []


def is_sqlite_locked(error: BaseException) -> bool:
    """Whether a statement of SQLite failed because another process holds a lock."""
    return isinstance(error, sqlite3.Error) and "is locked" in str(error)  # "database", "database table" or "schema"


def execute_when_unlocked(connection: sqlite3.Connection, *statements: str) -> tuple[Any, ...]:
    """Execute statements until no other process holds a lock that they need; returns the last one's first row."""

    def execute() -> tuple[Any, ...]:
        rows = [connection.execute(statement).fetchone() for statement in statements]
        return rows[-1] or ()

    return _retry_while_locked(connection, execute)


def _retry_while_locked(connection: sqlite3.Connection, work: Callable[[], _Result]) -> _Result:
    """Repeat work that needs a lock, until no other process holds it."""
    wait: LockWait | None = None
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            result = work()
        except sqlite3.Error as error:  # noqa: PERF203 - each turn waits anyway
            if connection.in_transaction:
                connection.rollback()
            if not is_sqlite_locked(error):
                raise
            if wait is None:
                path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
                wait = LockWait(str(path), partial(sqlite_lock_holders, path))
            wait.note_failure()
            time.sleep(pause_s)  # SQLite itself doesn't wait where that could be a deadlock
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        else:
            if wait is not None:
                wait.note_success()
            return result


def sqlite_lock_holders(path: Path) -> list[str]:
    """The other processes that hold a database's locks now, as far as the kernel knows. The database isn't opened: the
    locks are on bytes of its file or, with a log (WAL), of the log's index."""
    return file_lock_holders(path, path.with_name(f"{path.name}-shm"))
