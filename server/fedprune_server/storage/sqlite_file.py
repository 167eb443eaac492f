"""A small SQLite file, for what is not in the server's database: identity, console, logs of boards."""

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
        tables: Statements that make its tables if they don't exist.
        version: Of its tables; a file of another version is refused.
        hint: What to do if it is damaged.
        read_only: Only look: nothing is made or changed, and a disk that can't be written to will do.
        wal: Whether readers don't wait for writers.
    """

    def __init__(
        self, path: Path, tables: str, version: int, hint: str, *, read_only: bool = False, wal: bool = False
    ) -> None:
        self.path, self._hint = path, hint
        self._begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        with self.errors(), storage_errors(f"can't use {path}"):
            # Made with its mode, not changed to it: there is no moment in which others could open it.
            flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
            os.close(os.open(path, flags, 0o600))
            self.connection = self.connect(read_only=read_only)
            try:
                if wal:
                    self.connection.execute("PRAGMA journal_mode=WAL")
                self.connection.execute("PRAGMA synchronous=FULL")
                found = self.connection.execute("PRAGMA user_version").fetchone()[0]
                if found not in ((version,) if read_only else (0, version)):
                    raise StorageError(f"{path} was written by another version", expected=version, got=found)
                if found != version:
                    script = f"BEGIN IMMEDIATE; {tables}; PRAGMA user_version={version}; COMMIT"
                    self.connection.executescript(script)
            except BaseException:
                self.connection.close()
                raise

    def connect(self, *, read_only: bool = True) -> sqlite3.Connection:
        """A connection of one thread at a time, which needn't be this one."""
        uri = f"{self.path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self.errors(), self.connection as connection:  # which commits, or rolls back
            connection.execute(self._begin)
            yield connection

    def version(self) -> int:
        """A number that is another one after another connection has changed anything."""
        with self.errors():
            return int(self.connection.execute("PRAGMA data_version").fetchone()[0])

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
