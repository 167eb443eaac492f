"""Files and folders of a board that the installer, as root, compares, deletes, and gives to the service's user."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fedprune.core.errors import StorageError
from fedprune_device.launcher.slot_store import Owner, sync_slot_folder


def has_content(path: Path, data: bytes, mode: int) -> bool:
    """Whether a file has this content and these permissions."""
    try:
        return path.read_bytes() == data and stat.S_IMODE(path.stat().st_mode) == mode
    except OSError:
        return False


def overwrite_and_delete(path: Path) -> None:
    """Overwrite a file and delete it. FAT writes in place, so that no secret stays on a card.

    After a power cut the file may still exist, filled with zeros.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        zeros = b"\0" * os.fstat(descriptor).st_size
        while zeros:
            zeros = zeros[os.write(descriptor, zeros) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()
    sync_slot_folder(path.parent)


def are_owned_by(paths: Iterable[Path], owner: Owner | None) -> bool:
    if owner is None:
        return True
    try:
        return all((s.st_uid, s.st_gid) == owner for path in paths for _, _, s in _walk(path))
    except OSError:
        return False


def give_to_owner(paths: Iterable[Path], owner: Owner | None) -> None:
    """Give these paths and all below them to an owner. Links are given themselves, never their targets."""
    if owner is not None:
        for path in paths:
            for name, folder, status in _walk(path):
                if (status.st_uid, status.st_gid) != owner:
                    with suppress(FileNotFoundError):
                        os.chown(name, *owner, dir_fd=folder, follow_symlinks=False)


def delete_folder(folder: Path) -> None:
    """Delete a folder with its content; raises `StorageError` for a link to a folder."""
    if folder.is_symlink():
        raise StorageError(
            f"{folder} is a link to {folder.readlink()}",
            expected="a folder",
            hint="Delete what it leads to and then the link, and run this again.",
        )
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _walk(path: Path) -> Iterator[tuple[str, int | None, os.stat_result]]:
    """Name, open folder and state of a path and of all below it.

    Folders are open ones, so that a user who can write to them can't lead root elsewhere by a link.
    """
    yield str(path), None, path.lstat()
    for _, folders, files, descriptor in os.fwalk(path):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                yield name, descriptor, os.stat(name, dir_fd=descriptor, follow_symlinks=False)
