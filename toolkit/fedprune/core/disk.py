"""File reads, locks and flushes, with the operating system's errors as `StorageError`."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedprune.core.errors import BusyError, StorageError, StorageFullError, path_remedy

# The largest file that is read into memory: a protocol buffer, such as an ONNX model, can't be larger.
MAX_READ_BYTES = 2**31 - 1

# EFBIG too: FAT and `ulimit -f` limit the size of one file.
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_exists(path: Path, *, file: bool = False) -> bool:
    """Whether a path that a user gave exists, also where no file can have that name; `file` requires a regular file."""
    try:
        return path.is_file() if file else path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte in it
        return False


def open_file(path: Path | str) -> BinaryIO:
    """A regular file, or a link to one, open for reading; a pipe or device is refused with an `OSError` without
    blocking."""
    return os.fdopen(_open_regular(path, os.O_RDONLY), "rb")


def open_own_file(path: Path, flags: int, mode: int = 0o600) -> int:
    """A descriptor of a regular file of this program. A link, too, is refused with an `OSError`: root may run a command
    in the folder of a service's user, who could put a link to any file of root there."""
    try:
        return _open_regular(path, flags | os.O_NOFOLLOW, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "a link, where a file is expected; see who made it", str(path)) from error


def _open_regular(path: Path | str, flags: int, mode: int = 0o600) -> int:
    # Non-blocking: opening a pipe that nobody writes to would wait forever. Regular files ignore the flag.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_file(path: Path | str, max_bytes: int = MAX_READ_BYTES, *, own: bool = False) -> bytes:
    """The bytes of a regular file, with `own` of one that is no link. Raises `OSError` as `open_file` or
    `open_own_file`, or if it has more than `max_bytes` bytes."""
    with os.fdopen(open_own_file(Path(path), os.O_RDONLY), "rb") if own else open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > max_bytes else file.read()  # a limit would be taken from memory at once
    if (length := max(size, len(content))) > max_bytes:
        raise OSError(errno.EINVAL, f"it has {length} bytes, more than {max_bytes}", str(path))
    return content


@contextmanager
def storage_errors(what: str, *, missing: bool = False) -> Iterator[None]:
    """Raise errors of the operating system as `StorageError`, a full disk or quota as `StorageFullError`.

    `what` is the failed action, for the message; `missing` lets `FileNotFoundError` through.
    """
    try:
        yield
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        if error.errno in _DISK_FULL_ERRNOS:
            hint = path_remedy(error) or "Free some space; what was there before is untouched."
            raise StorageFullError(f"{what}: {error.strerror}", hint=hint) from error
        raise StorageError(f"{what}: {error.strerror}", hint=path_remedy(error)) from error


@contextmanager
def file_lock(path: Path, busy_message: str, hint: str) -> Iterator[None]:
    """Hold a file's lock, which the kernel releases however the process ends. Raises `BusyError` with these texts if
    another process holds it."""
    # flock and not fcntl's record locks: those are lost as soon as any code of this process closes the file.
    with storage_errors(f"can't open {path}"):
        descriptor = open_own_file(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(busy_message, hint=hint) from error
        except OSError as error:
            raise StorageError(f"can't lock {path}: {error.strerror}") from error
        if not os.fstat(descriptor).st_nlink:  # its last holder has deleted it: the next process would lock a new file
            raise BusyError(busy_message, hint=hint)
        yield
    finally:
        os.close(descriptor)


def has_lock_holder(path: Path) -> bool:
    """Whether a process holds a file's lock (`file_lock`). Raises `StorageError` if the file exists and can't be
    opened."""
    with storage_errors(f"can't open {path}"):
        try:
            descriptor = open_own_file(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two askers must not see each other
    except BlockingIOError:
        return True
    except OSError as error:
        raise StorageError(f"can't lock {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return False


def write_all(descriptor: int, data: bytes | memoryview, offset: int = 0) -> None:
    """Write all of `data` at an offset; the kernel may take it in several calls. Raises `OSError` as `os.pwrite`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def file_digest(path: Path) -> str:
    """The sha256 of a file as hex, read in chunks. Raises `OSError` if it can't be read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def flush_file(path: Path) -> None:
    """Make a file's content survive a power cut. Raises `OSError` if the file can't be opened, or the disk fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut: a file's own flush doesn't cover its name."""
    flush_file(folder)


def make_private_folder(path: Path) -> None:
    """Make a folder and the missing folders above it, all for this user alone.

    `Path.mkdir` gives its mode to the last folder only. Raises `OSError`.
    """
    for folder in (p for p in reversed(path.parents) if not p.exists()):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
