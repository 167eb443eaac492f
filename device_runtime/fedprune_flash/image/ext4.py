"""Read small files of an image's ext4 file system, by debugfs of e2fsprogs, to recognise its system.

Nothing is ever written.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedprune_flash.image.partitions import Partition
from fedprune_flash.image.programs import run_program

# Short targets are stored in the inode itself, and printed so.
_LINK = re.compile(r'^Fast link dest: "([^"\n]*)"$', re.MULTILINE)
_MAX_STATUS = 2**16


class Ext4:
    """The file system of a partition in an image.

    Paths must be constants of the code, since debugfs has a quoting of its own.
    """

    def __init__(self, image: Path, partition: Partition) -> None:
        self._image, self._start = image, partition.start

    def exists(self, path: str) -> bool:
        return self._status(path).startswith("Inode:")

    def read(self, path: str, limit: int) -> bytes:
        """The beginning of a file; empty if there is no file, or it can't be read."""
        return self._run_debugfs(f"cat {path}", limit)

    def link_target(self, path: str) -> str:
        """The target of a symbolic link; empty if the path is no link."""
        target = _LINK.search(self._status(path))
        return "" if target is None else target[1]

    def _status(self, path: str) -> str:
        return self._run_debugfs(f"stat {path}", _MAX_STATUS).decode("utf-8", "replace")

    def _run_debugfs(self, request: str, limit: int) -> bytes:
        # By the number of an open file, because debugfs takes a question mark in a path for the beginning of options.
        with self._image.open("rb") as file:
            words = ["-R", request, f"/dev/fd/{file.fileno()}?offset={self._start}"]
            return run_program("debugfs", words, limit, environment={"DEBUGFS_PAGER": "cat"}, file=file.fileno()).output
