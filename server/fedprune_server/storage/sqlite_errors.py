"""What SQLite says of a file that can't be used, as this project's own errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.errors import StorageError, StorageFullError


@contextmanager
def sqlite_errors(path: Path, hint: str, room: str = "Make room on the disk.") -> Iterator[None]:
    """Translate errors of SQLite.

    Args:
        path: The database.
        hint: What to do where it is damaged.
        room: What to do where the disk is full.

    Raises:
        StorageFullError: There is no room.
        StorageError: It can't be used.
    """
    try:
        yield
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFullError(f"no room left for {path}", hint=room) from error
        raise StorageError(f"{path}: {error}", hint=hint) from error
