"""Files that a power cut can't tear: whole old content or whole new content, never something between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fedprune.core.disk import storage_errors, sync_file, sync_folder
from fedprune.core.errors import StorageError

# `.name.partial` is a file that is being written; its path has one writer at a time.
_PARTIAL = ".partial"


@contextmanager
def appearing(path: Path, *, private: bool = False, sync: bool = True) -> Iterator[Path]:
    """Write a file so that it appears whole or not at all; yields where to write it.

    Args:
        path: What was there before stays until the block ends, and where the block fails or the disk is full.
        private: Whether only this user may read it, from its first byte on.
        sync: Whether that holds for power cuts, too.
    """
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    with storage_errors(f"can't write {path}"):
        try:
            if private:
                partial.unlink(missing_ok=True)  # one that was left over may be open to others
                os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            yield partial
            if sync:
                sync_file(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)


def write_whole(path: Path, data: bytes | memoryview, *, private: bool = False, sync: bool = True) -> None:
    """Replace a file's content as `appearing` does: after a crash at any moment it has the old content or the new
    one."""
    with appearing(path, private=private, sync=sync) as partial:
        partial.write_bytes(data)


def place(source: Path, path: Path, *, sync: bool = True) -> None:
    """Put a file that never changes at a second path, as a hard link where the disk has them, else as a copy, whole or
    not at all."""
    with appearing(path, sync=False) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise
            shutil.copyfile(source, partial)
            if sync:
                sync_file(partial)
    if sync:
        with storage_errors(f"can't write {path}"):
            sync_folder(path.parent)


def move(source: Path, path: Path) -> None:
    """Rename a file within a disk, durably. Raises `StorageError` if the disk fails, or `source` is missing."""
    with storage_errors(f"can't write {path}"):
        source.replace(path)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, durably; one that isn't there is fine. Raises `StorageError` if the disk fails."""
    with storage_errors(f"can't write {path}"):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_document(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON document with its own digest, so that damage is noticed; the old one stays where the disk is
    full."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    document = {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_whole(path, json.dumps(document).encode(), private=True)


def read_document(path: Path) -> dict[str, Any] | None:
    """A document as `write_document` wrote it; None if it does not exist. Raises `StorageError` if it is damaged or
    can't be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from error
    try:
        outer = json.loads(raw)
        text = outer["body"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("the digest is another")
        body: dict[str, Any] = json.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error})") from error
    return body


def sweep(folder: Path, name: str = "*") -> None:
    """Delete what a killed process left unfinished in a folder, of the file `name` alone if that is given.

    No process may be writing these files. Raises `StorageError` if the disk fails.
    """
    with storage_errors(f"can't write {folder}"):
        for path in folder.glob(f".{name}{_PARTIAL}"):
            path.unlink(missing_ok=True)
