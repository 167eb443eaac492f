"""The lock of a state folder: one server at a time works on it, and other processes see whether one does."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune.core.disk import open_own_file, storage_errors, write_all
from fedprune.core.errors import StorageError

log = logging.getLogger("fedprune.server")

# The file that the server on the folder locks; its content is a random identifier of the run.
LOCK_FILE = "lock"

_RUN_BYTES = 16

_LOCK_PATIENCE_S = 3.0


@contextmanager
def folder_lock(path: Path, *, standby: bool = False) -> Iterator[None]:
    """Lock a state folder against other servers; raises `StorageError` if one runs. A standby waits for it instead."""
    descriptor = _take_lock(path, standby=standby)
    try:
        with suppress(OSError):  # a disk without room for these bytes doesn't keep `check` from making some
            write_all(descriptor, secrets.token_hex(_RUN_BYTES // 2).encode())
        yield
    finally:
        os.close(descriptor)


def run_id(folder: Path) -> str:
    """The identifier of the run that holds a folder's lock, or did so last; empty if there was none."""
    try:
        return (folder / LOCK_FILE).read_bytes()[:_RUN_BYTES].decode(errors="replace")
    except OSError:
        return ""


def _take_lock(path: Path, *, standby: bool) -> int:
    """Lock the folder's file; returns its descriptor, which holds the lock until it is closed."""
    with storage_errors(f"can't use state folder {path}"):
        descriptor = open_own_file(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + (math.inf if standby else _LOCK_PATIENCE_S)
    has_logged = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError as error:
                # A server that was killed a moment ago may still have a child that holds the file open.
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"another server runs on {path}", hint="Stop it, or give another --state folder."
                    ) from error
                if standby and not has_logged:
                    log.info("standing by: another server runs on %s", path)
                    has_logged = True
            time.sleep(0.1)
    except BaseException:
        os.close(descriptor)
        raise
