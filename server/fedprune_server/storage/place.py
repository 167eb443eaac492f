"""Where a state folder's database is: the file `server.db` in it, or, as its file `database` says, elsewhere."""

from __future__ import annotations

from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError
from fedprune_server.storage.database import check_url

FILE = "server.db"
MODEL = "model.onnx"
"""The model that the job began with."""
PLACE = "database"
"""Holds a URL, perhaps with a password: its owner's alone."""

_LONGEST = 4096


def url_of(folder: Path, chosen: str | None = None) -> str:
    """The URL of a folder's database, which need not be there yet.

    Args:
        folder: The state folder.
        chosen: The URL that somebody gave; it wins.

    Raises:
        ConfigError: It is no URL that can be used; so for one in the folder.
        StorageError: The folder can't be read.
    """
    url = chosen or kept(folder)
    if url is None:
        return f"sqlite:///{folder.resolve() / FILE}"
    return check_url(url).render_as_string(hide_password=False)


def kept(folder: Path) -> str | None:
    """The URL that `keep` wrote, or None.

    Raises:
        StorageError: It can't be read, or is damaged.
    """
    path = folder / PLACE
    with storage_errors(f"can't read {path}", missing=True):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or len(text) > _LONGEST or not text.isprintable():
        raise StorageError(f"{path} is damaged", expected="a database's URL", hint="Write it, or give --database.")
    return text


def keep(folder: Path, url: str) -> None:
    """Note where a folder's database is, for the next start and for commands that look at the folder.

    Raises:
        StorageError: The disk fails or is full.
    """
    if url != f"sqlite:///{folder.resolve() / FILE}" and kept(folder) != url:
        write_whole(folder / PLACE, f"{url}\n".encode(), private=True)
