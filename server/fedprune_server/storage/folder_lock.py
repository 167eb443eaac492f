"""The lock of a state folder: one server at a time, and nobody else's work while it runs."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError

log = logging.getLogger("fedprune.server")

LOCK = "lock"
"""Held by the server that runs on the folder."""

_PATIENCE_S = 3.0


@contextmanager
def folder_lock(path: Path, *, standby: bool = False) -> Iterator[None]:
    """Keep servers off a state folder.

    Args:
        path: The folder.
        standby: Wait until no server has it, however long that takes.

    Raises:
        StorageError: One runs on it, or it can't be used.
    """
    descriptor = _taken(path, standby=standby)
    try:
        yield
    finally:
        os.close(descriptor)


def _taken(path: Path, *, standby: bool) -> int:
    """The descriptor of a folder's lock, held."""
    with storage_errors(f"can't use state folder {path}"):
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    until = time.monotonic() + (math.inf if standby else _PATIENCE_S)
    said = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError as error:
                # A server that was killed a moment ago may still have a child that holds the file open.
                if time.monotonic() > until:
                    raise StorageError(
                        f"another server runs on {path}", hint="Stop it, or give another --state folder."
                    ) from error
                if standby and not said:
                    log.info("standing by: another server runs on %s", path)
                    said = True
            time.sleep(0.1)
    except BaseException:
        os.close(descriptor)
        raise
