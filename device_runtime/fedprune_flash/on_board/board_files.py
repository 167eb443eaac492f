"""Files of a board that the installer writes as root: whole or not at all, and only where something changes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Owner = tuple[int, int]
"""Numbers of a user and its group."""


def write(path: Path, data: bytes, mode: int, owner: Owner | None = None) -> None:
    """Replace a file's content: after a power cut it has the old content or the new one.

    Args:
        path: The file; its folder is made where there is none.
        data: The new content.
        mode: Its permissions, from its first byte on.
        owner: Whose it is; this user's by default.

    Raises:
        OSError: The disk fails or is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.partial")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        if owner is not None:
            os.fchown(descriptor, *owner)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    new.replace(path)
    sync(path.parent)


def holds(path: Path, data: bytes, mode: int) -> bool:
    """Whether a file has this content and these permissions."""
    try:
        return path.read_bytes() == data and stat.S_IMODE(path.stat().st_mode) == mode
    except OSError:
        return False


def sync(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut.

    Raises:
        OSError: The disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def blacken(path: Path) -> None:
    """Overwrite a file and delete it. FAT writes in place, so that a secret doesn't stay on a card.

    Raises:
        OSError: The disk fails.
    """
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync(path.parent)


def owned(paths: Iterable[Path], owner: Owner | None) -> bool:
    """Whether all of these, and what lies in them, are somebody's; True where nobody is named."""
    if owner is None:
        return True
    try:
        return all((p.lstat().st_uid, p.lstat().st_gid) == owner for path in paths for p in _tree(path))
    except OSError:
        return False


def give(paths: Iterable[Path], owner: Owner | None) -> None:
    """Give these, and what lies in them, to somebody; links themselves, never what they lead to.

    Raises:
        OSError: One is missing, or this is not root.
    """
    if owner is not None:
        for path in paths:
            for found in _tree(path):
                os.chown(found, *owner, follow_symlinks=False)


def empty(folder: Path) -> None:
    """Delete what is in a folder; links are deleted, never followed.

    Raises:
        OSError: The disk fails.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def drop(folder: Path) -> None:
    """Delete a folder and what is in it; one that isn't there is fine.

    Raises:
        OSError: The disk fails.
    """
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _tree(path: Path) -> Iterable[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")
