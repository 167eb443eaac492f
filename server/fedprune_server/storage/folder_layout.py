"""Where things are in a state folder: the database, the first model, and the folders of further jobs.

The database is the file `server.db` in the folder, unless the file `database` in it names another one.
"""

from __future__ import annotations

from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune_server.storage.database import parse_database_url

DATABASE_FILE = "server.db"

# The model that the job began with.
MODEL_FILE = "model.onnx"

# Has the state folders of further jobs, by name.
JOBS_FOLDER = "jobs"

# Holds a URL, perhaps with a password: only its owner may read it.
URL_FILE = "database"

_MAX_URL_LENGTH = 4096


def database_url(folder: Path, configured: str | None = None) -> str:
    """The URL of a folder's database, which need not exist yet: the configured URL, else the stored one, else the file.
    Raises `ConfigError` if it is no URL that can be used."""
    url = configured or stored_url(folder)
    if url is None:
        return f"sqlite:///{folder.resolve() / DATABASE_FILE}"
    return parse_database_url(url).render_as_string(hide_password=False)


def has_database(folder: Path) -> bool:
    """Whether a server has used a folder, or a command has begun its database."""
    return (folder / DATABASE_FILE).is_file() or (folder / URL_FILE).is_file()


def stored_url(folder: Path) -> str | None:
    """The URL that `store_url` stored, or None. Raises `StorageError` if it can't be read, or is damaged."""
    path = folder / URL_FILE
    with storage_errors(f"can't read {path}", missing=True):
        try:
            raw = read_file(path, own=True)
        except FileNotFoundError:
            return None
    try:
        url = raw.decode().strip()
    except UnicodeDecodeError:
        url = ""
    if not url or len(url) > _MAX_URL_LENGTH or not url.isprintable():
        raise StorageError(f"{path} is damaged", expected="a URL", hint="Write it, or delete it and give --database.")
    return url


def store_url(folder: Path, url: str) -> None:
    """Store the database's URL for the next start and for commands on the folder."""
    if url != f"sqlite:///{folder.resolve() / DATABASE_FILE}" and stored_url(folder) != url:
        write_atomically(folder / URL_FILE, f"{url}\n".encode(), private=True)


def job_folders(state: Path) -> list[Path]:
    """Folders of further jobs (`jobs/NAME`), by name. Raises `StorageError` if they can't be read."""
    root = state / JOBS_FOLDER
    with storage_errors(f"can't read {root}"):
        subfolders = [p for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []
    return sorted(p for p in subfolders if p.is_dir())
