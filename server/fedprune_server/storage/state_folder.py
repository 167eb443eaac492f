"""A state folder: its lock, the folders of further jobs, and the URL of its database.

The database is the file `server.db` in the folder, unless the file `database` in it names another one.
"""

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

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import StorageError
from fedprune_server.storage.database import parse_database_url

DATABASE_FILE = "server.db"

# The model that the job began with.
MODEL_FILE = "model.onnx"

# Holds a URL, perhaps with a password: only its owner may read it.
URL_FILE = "database"

_MAX_URL_LENGTH = 4096


def database_url(folder: Path, configured: str | None = None) -> str:
    """The URL of a folder's database, which need not exist yet; `chosen`, from the configuration, takes precedence.
    Raises `ConfigError` if it is no URL that can be used.
    """
    url = configured or stored_url(folder)
    if url is None:
        return f"sqlite:///{folder.resolve() / DATABASE_FILE}"
    return parse_database_url(url).render_as_string(hide_password=False)


def has_database(folder: Path) -> bool:
    """Whether a server has used a folder, or a command has begun its database."""
    return (folder / DATABASE_FILE).is_file() or (folder / URL_FILE).is_file()


def stored_url(folder: Path) -> str | None:
    """The URL that `keep` stored, or None. Raises `StorageError` if it can't be read, or is damaged."""
    path = folder / URL_FILE
    with storage_errors(f"can't read {path}", missing=True):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        url = raw.decode().strip()
    except UnicodeDecodeError:
        url = ""
    if not url or len(url) > _MAX_URL_LENGTH or not url.isprintable():
        raise StorageError(f"{path} is damaged", expected="a database's URL", hint="Write it, or give --database.")
    return url


def store_url(folder: Path, url: str) -> None:
    """Store the database's URL for the next start and for commands on the folder."""
    if url != f"sqlite:///{folder.resolve() / DATABASE_FILE}" and stored_url(folder) != url:
        write_atomically(folder / URL_FILE, f"{url}\n".encode(), private=True)


JOBS_FOLDER = "jobs"


def job_folders(state: Path) -> list[Path]:
    """Folders of further jobs (`jobs/NAME` in the state folder), by name. Raises `StorageError` if unreadable."""
    root = state / JOBS_FOLDER
    with storage_errors(f"can't read {root}"):
        subfolders = [p for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []
    return sorted(p for p in subfolders if p.is_dir())


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
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
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
