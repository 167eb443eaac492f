"""Files that a power cut can't tear: whole old content or whole new content, never something between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprune.core.disk import storage_errors, sync_folder
from fedprune.core.errors import StorageError

TEMPORARY = ".new-"
"""How names of unfinished files begin; whoever opens a folder may delete what an earlier process left."""


def write(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace a file's content: after a crash at any moment it has the old content or the new one.

    Args:
        path: The file.
        data: The new content.
        sync: Whether that holds for power cuts, too.

    Raises:
        StorageFullError: No room; the old content is untouched.
        StorageError: The disk fails.
    """
    with storage_errors(f"can't write {path}"), _temporary(path) as (descriptor, new):
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        new.replace(path)
        if sync:
            sync_folder(path.parent)


def place(source: Path, path: Path, *, sync: bool = True) -> None:
    """Put a file that never changes at a second path, as a hard link where the disk has them, else as a copy.

    Args:
        source: The file.
        path: Where to.
        sync: Whether it is whole after a power cut, too.

    Raises:
        StorageFullError: No room; what was at `path` is untouched.
        StorageError: The disk fails, or `source` is missing.
    """
    with storage_errors(f"can't write {path}"), _temporary(path) as (descriptor, new):
        os.close(descriptor)
        new.unlink()
        try:
            os.link(source, new)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise
            shutil.copyfile(source, new)
            if sync:
                with new.open("rb") as file:
                    os.fsync(file.fileno())
        new.replace(path)
        if sync:
            sync_folder(path.parent)


def move(source: Path, path: Path) -> None:
    """Rename a file within a disk, durably.

    Raises:
        StorageError: The disk fails, or `source` is missing.
    """
    with storage_errors(f"can't write {path}"):
        source.replace(path)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file, durably; one that isn't there is fine.

    Raises:
        StorageError: The disk fails.
    """
    with storage_errors(f"can't write {path}"):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_document(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON document with its own digest, so that damage is noticed.

    Raises:
        StorageFullError: No room; the old document is untouched.
        StorageError: The disk fails.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    write(path, json.dumps({"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode())


def read_document(path: Path) -> dict[str, Any] | None:
    """A document as `write_document` wrote it; None where there is none.

    Raises:
        StorageError: It is damaged or can't be read.
    """
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


def sweep(folder: Path) -> None:
    """Delete what a process that was killed left unfinished in a folder.

    Raises:
        StorageError: The disk fails.
    """
    with storage_errors(f"can't write {folder}"):
        for path in folder.glob(f"{TEMPORARY}*"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[int, Path]]:
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        yield descriptor, Path(name)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
