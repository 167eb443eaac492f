"""A part of an open file: a partition of an image or of a card."""

from __future__ import annotations

from typing import BinaryIO

from fedprune.core.errors import ImageError


class Region:
    """Bytes of a file, from an offset on, that are read and written as a file of their own.

    Args:
        file: The file, opened for reading, and for writing if anything is written.
        start: Where the region begins, in bytes.
        size: How many bytes it has.
        name: What it is, for errors.
    """

    def __init__(self, file: BinaryIO, start: int, size: int, name: str) -> None:
        self._file, self._start = file, start
        self.size, self.name = size, name

    def read(self, at: int, count: int) -> bytes:
        """Bytes from an offset on.

        Raises:
            ImageError: They are not all there.
        """
        self._check(at, count)
        self._file.seek(self._start + at)
        found = self._file.read(count)
        if len(found) != count:
            raise ImageError(f"{self.name} is cut short", expected=f"{count} bytes at {at}", got=len(found))
        return found

    def write(self, at: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes at an offset.

        Raises:
            ImageError: They don't fit in.
            OSError: The disk fails.
        """
        self._check(at, len(data))
        self._file.seek(self._start + at)
        self._file.write(data)

    def _check(self, at: int, count: int) -> None:
        if at < 0 or count < 0 or at + count > self.size:
            raise ImageError(f"{self.name} points outside itself", expected=f"0 to {self.size}", got=f"{at} + {count}")
