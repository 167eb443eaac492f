"""Passes a device's samples to another process in a file that it maps: a pipe would copy them four times."""

from __future__ import annotations

import mmap
import pickle  # nosec B403  # what this process has made, and another gets by a pipe of the two
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.tensorfile import ALIGNMENT
from fedprune_device.data.dataset import LocalData


@dataclass(frozen=True)
class SampleFile:
    """A device's samples, whose arrays are in a file. It can be pickled.

    Attributes:
        head: The samples' pickle without their arrays.
        spans: Where each array begins and ends in the file.
    """

    path: Path
    head: bytes
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def write(cls, path: Path, data: LocalData) -> SampleFile:
        """Write samples into a file. Raises `StorageError` if the disk fails."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
        spans, end = [], 0
        with storage_errors(f"can't write {path}"), path.open("wb") as file:
            for buffer in buffers:
                start = end + -end % ALIGNMENT
                file.seek(start)
                end = start + file.write(buffer.raw())
                spans.append((start, end))
            file.truncate(max(end, 1))  # an empty file can't be mapped
        return cls(path, head, tuple(spans))

    def load(self) -> LocalData:
        """The samples, in pages of the file that are copied where they are written to. The file may be deleted then.
        Raises `StorageError` if it can't be read."""
        with storage_errors(f"can't read {self.path}"), self.path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        data: LocalData = pickle.loads(self.head, buffers=[view[a:b] for a, b in self.spans])  # noqa: S301  # nosec B301
        return data
