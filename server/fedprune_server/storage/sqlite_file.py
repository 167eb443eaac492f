"""A small SQLite file, for what is not in the server's database: console, logs of boards."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.closing import Closing
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError, StorageFullError

BUSY_S = 10.0
"""How long a statement that writes waits for another process."""


class SqliteFile(Closing):
    """A SQLite file that only its owner can read, created if it doesn't exist.

    Its methods raise `StorageError` if it is damaged, or the disk fails or is full.

    Args:
        tables: Statements that make its tables if they don't exist, and bring those of earlier versions along.
        version: Of its tables; a file of a later version is refused.
        hint: What to do if it is damaged.
        wal: Whether readers don't wait for writers.
    """

    def __init__(self, path: Path, tables: str, version: int, hint: str, *, wal: bool = False) -> None:
        self.path, self._hint = path, hint
        with self.errors(), storage_errors(f"can't use {path}"):
            # Made with its mode, not changed to it: there is no moment in which others could open it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.connection = self._connect("rw")
            try:
                if wal:
                    self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.execute("PRAGMA synchronous=FULL")
                found = self.connection.execute("PRAGMA user_version").fetchone()[0]
                if found > version:
                    raise StorageError(f"{path} was written by a later version", expected=version, got=found)
                if found != version:
                    script = f"BEGIN IMMEDIATE; {tables}; PRAGMA user_version={version}; COMMIT"
                    self.connection.executescript(script)
            except BaseException:
                self.connection.close()
                raise

    def reader(self) -> sqlite3.Connection:
        """A connection that only reads, of one thread at a time, which needn't be this one."""
        return self._connect("ro")

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.resolve().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)

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


@contextmanager
def sqlite_errors(path: Path, hint: str) -> Iterator[None]:
    """Turn errors of SQLite into `StorageError`, with a hint for a damaged file, and `StorageFullError`."""
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFullError(f"no room left for {path}", hint="Make room on the disk.") from error
        raise StorageError(f"{path}: {error}", hint=hint) from error
