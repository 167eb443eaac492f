"""Atomic file writes: after a crash or power cut a file has its old content or its new one, nothing in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fedprune.core.disk import flush_folder, open_file, read_file, storage_errors
from fedprune.core.errors import StorageError

# A file is written as `.name.partial` beside its path: a rename is atomic only within one disk. The name is fixed, so
# that leftovers can be swept; each path has one writer at a time.
_PARTIAL_SUFFIX = ".partial"


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL_SUFFIX}")


@contextmanager
def atomic_write(path: Path, *, private: bool = False, sync: bool = True) -> Iterator[BinaryIO]:
    """Write a file atomically; yields the new file, whose `name` is its path until then.

    Args:
        path: The old file stays until the block ends; also if the block fails or the disk is full.
        private: Let only this user read the file, from its first byte on.
        sync: Make the write survive a power cut, too.
    """
    partial = _partial_path(path)
    mode = 0o600 if private else 0o666  # less the umask
    with storage_errors(f"can't write {path}"):
        try:
            # A leftover may have been opened by another user, or be that user's link to a file of ours. Exclusive, and
            # written through this descriptor alone, the new file is nobody else's.
            partial.unlink(missing_ok=True)
            with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
                if sync:
                    # The content before the name: else a power cut can leave the new name with an empty file.
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            # Suppressed, so that the error of the write is raised and not that of the clean-up.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if sync:
            flush_folder(path.parent)


def write_atomically(path: Path, data: bytes | memoryview, *, private: bool = False, sync: bool = True) -> None:
    """Replace a file's content as `atomic_write` does."""
    with atomic_write(path, private=private, sync=sync) as file:
        file.write(data)


def link_or_copy(source: Path, path: Path, *, sync: bool = True) -> None:
    """Give a file that never changes a second path: a hard link where the disk has them, else an atomic copy."""
    partial = _partial_path(path)
    with storage_errors(f"can't write {path}"):
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
            partial.replace(path)
        except OSError as error:
            # No copy could succeed after these either; FAT, some network disks and containers refuse links alone.
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise
            with atomic_write(path, sync=sync) as file, open_file(source) as original:
                shutil.copyfileobj(original, file, 2**20)
        finally:
            # The rename failed, or did nothing: that is what it does if both names are of one file.
            partial.unlink(missing_ok=True)
        if sync:
            flush_folder(path.parent)


def move_durably(source: Path, path: Path) -> None:
    """Rename a file within a disk, durably. Raises `StorageError` if the disk fails, or `source` is missing."""
    with storage_errors(f"can't write {path}"):
        source.replace(path)
        flush_folder(path.parent)


def remove_durably(path: Path) -> None:
    """Delete a file durably, if it exists. Raises `StorageError` if the disk fails."""
    with storage_errors(f"can't write {path}"):
        path.unlink(missing_ok=True)
        flush_folder(path.parent)


def write_document(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON document with its own digest, which reveals damage. If the disk is full, the old one stays."""
    # The body is a string within the document, so that the digest is of bytes and not of one encoder's formatting.
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    document = {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(path, json.dumps(document).encode(), private=True)


def read_document(path: Path) -> dict[str, Any] | None:
    """Read a document that `write_document` wrote; None if it does not exist. Raises `StorageError` if it is damaged or
    can't be read."""
    try:
        raw = read_file(path, own=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from error
    try:
        document = json.loads(raw)
        text = document["body"]
        if hashlib.sha256(text.encode()).hexdigest() != document["sha256"]:
            raise ValueError("its digest doesn't match")
        body: dict[str, Any] = json.loads(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error})") from error
    return body


def remove_partial_files(folder: Path, name: str = "*") -> None:
    """Delete the unfinished files that a killed process left in a folder, or only those of the file `name`.

    No process may be writing these files. Raises `StorageError` if the disk fails.
    """
    with storage_errors(f"can't write {folder}"):
        for path in folder.glob(f".{name}{_PARTIAL_SUFFIX}"):
            path.unlink(missing_ok=True)
