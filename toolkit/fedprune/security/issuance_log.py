"""The authority's append-only register of issued and revoked certificates.

A line is on the disk before its certificate is handed out. Several processes may use it: a writer holds the file's lock
and first reads the lines that others have appended.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprune.core.disk import storage_errors, sync_folder, write_all
from fedprune.core.errors import StorageError


class Register:
    """An append-only file of JSON lines, made with mode 0600 where there is none.

    Args:
        take: Called for every line in order: existing ones, and later ones as they are read or appended.
        read_only: Nothing is made, repaired or appended, so that a read-only disk suffices.

    Raises:
        StorageError: A line is damaged.
    """

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], *, read_only: bool = False) -> None:
        self._path = path
        self._take = take
        self._read_only = read_only
        self._read = 0  # bytes
        self._holding = -1
        with self.held():
            pass

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for appending, with all lines read."""
        with storage_errors(f"can't use {self._path}"):
            new = not self._path.exists()
            how = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
            descriptor = os.open(self._path, how | os.O_CLOEXEC, 0o600)
        try:
            with storage_errors(f"can't use {self._path}"):
                fcntl.flock(descriptor, fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX)
                if new:
                    sync_folder(self._path.parent)
                self._catch_up(descriptor)
            self._holding = -1 if self._read_only else descriptor
            yield
        finally:
            self._holding = -1
            os.close(descriptor)

    def append(self, *entries: dict[str, Any]) -> None:
        """Add lines; all are on the disk when this returns, and none if it raises. Only while it is `held`."""
        if self._holding < 0:
            raise StorageError(f"{self._path} is not held")
        lines = [json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n" for entry in entries]
        raw = b"".join(lines)
        with storage_errors(f"can't write {self._path}"):
            try:
                write_all(self._holding, raw, self._read)
                os.fsync(self._holding)
            except OSError:
                os.ftruncate(self._holding, self._read)
                raise
        self._read += len(raw)
        for entry in entries:
            self._take(entry)

    def lines(self) -> list[str]:
        """The raw lines; complete while the register is held."""
        with storage_errors(f"can't read {self._path}"):
            return self._path.read_bytes()[: self._read].decode(errors="replace").splitlines()

    def _catch_up(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < self._read:
            raise StorageError(f"{self._path} has become shorter", hint="Restore the backup of the identity folder.")
        raw = os.pread(descriptor, size - self._read, self._read)
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw) and not self._read_only:  # torn by a power cut: its certificate was not handed out
            os.ftruncate(descriptor, self._read + whole)
            os.fsync(descriptor)
        try:
            for line in raw[:whole].splitlines():
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{self._path} is damaged ({error})", hint="Restore the backup of the identity folder."
            ) from error
        self._read += whole
