"""Keeps the digests of files on the disk, so that unchanged files are not read again at the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune.core.disk import open_own_file, storage_errors

_Entry = tuple[int, int, str]


class FileIndex:
    """Digests by path, valid while a file's size and modification time stay the same; without a path only in memory.

    The index has a line of JSON per digest and only grows, until more than half of its lines are stale: then it is
    rewritten. A damaged line is skipped, and its file read again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, _Entry] = {}
        self._seen: set[str] = set()
        self._new_lines: list[str] = []
        self._lines = 0
        self._ends_with_newline = True
        if path is not None:
            with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
                self._read(path)

    @contextmanager
    def update(self) -> Iterator[FileIndex]:
        """Look up every file in the body; at its end entries of other files are dropped, and new ones are written."""
        self._seen = set()
        yield self
        self._entries = {key: self._entries[key] for key in self._seen}
        if self._path is None or not (self._new_lines or self._lines > 2 * len(self._entries) + 100):
            return
        rewrites = self._lines + len(self._new_lines) > 2 * len(self._entries) + 100
        lines = [_line(key, entry) for key, entry in self._entries.items()] if rewrites else self._new_lines
        with storage_errors(f"can't write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            target = self._path.with_suffix(".new") if rewrites else self._path
            flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if rewrites else os.O_APPEND)
            with os.fdopen(open_own_file(target, flags), "w", encoding="ascii") as file:
                file.write(("" if rewrites or self._ends_with_newline else "\n") + "".join(lines))
            if rewrites:
                target.replace(self._path)
        self._lines = len(lines) + (0 if rewrites else self._lines)
        self._new_lines, self._ends_with_newline = [], True

    def find_digest(self, key: str, status: os.stat_result) -> str | None:
        size, changed, digest = self._entries.get(key, (-1, -1, ""))
        if (size, changed) != (status.st_size, status.st_mtime_ns):
            return None
        self._seen.add(key)
        return digest

    def add(self, key: str, status: os.stat_result, digest: str) -> str:
        self._entries[key] = (status.st_size, status.st_mtime_ns, digest)
        self._seen.add(key)
        self._new_lines.append(_line(key, self._entries[key]))
        return digest

    def _read(self, path: Path) -> None:
        with path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                self._lines += 1
                self._ends_with_newline = line.endswith("\n")
                with suppress(ValueError, TypeError, OverflowError, RecursionError):
                    key, size, changed, digest = json.loads(line)
                    if isinstance(key, str) and isinstance(digest, str) and len(digest) == 64:
                        self._entries[key] = (int(size), int(changed), digest)


def _line(key: str, entry: _Entry) -> str:
    return json.dumps([key, *entry]) + "\n"
