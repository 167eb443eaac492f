"""Passes a device's samples to another process in a file that it maps: a pipe would copy them four times."""

from __future__ import annotations

import copy
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.tensorfile import ALIGNMENT
from fedprune_device.data.dataset import SPLITS, LocalData

_ARRAY_FIELDS = tuple(f"{kind}_{split}" for split in SPLITS for kind in ("x", "y"))


@dataclass(frozen=True)
class _ArrayInFile:
    offset: int
    shape: tuple[int, ...]
    type: np.dtype[Any]
    is_fortran: bool

    @classmethod
    def append(cls, array: npt.NDArray[Any], file: IO[bytes]) -> _ArrayInFile:
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        offset = file.seek(file.tell() + -file.tell() % ALIGNMENT)
        file.write(np.ascontiguousarray(array.T if is_fortran else array).data)
        return cls(offset, array.shape, array.dtype, is_fortran)

    def map_array(self, pages: mmap.mmap) -> npt.NDArray[Any]:
        array: npt.NDArray[Any]
        array = np.ndarray(self.shape, self.type, pages, self.offset, order="F" if self.is_fortran else "C")
        return array


@dataclass(frozen=True)
class SampleFile:
    """A device's samples, whose arrays are in a file. It can be sent to another process.

    Attributes:
        arrays: Where the arrays are, by their fields. An array that is two fields is there once.
        other: The samples without their arrays.
    """

    path: Path
    arrays: dict[str, _ArrayInFile]
    other: LocalData

    @classmethod
    def write(cls, path: Path, data: LocalData) -> SampleFile:
        """Write samples into a file. Raises `StorageError` if the disk fails."""
        arrays: dict[str, _ArrayInFile] = {}
        by_id: dict[int, _ArrayInFile] = {}
        other = copy.copy(data)
        with storage_errors(f"can't write {path}"), path.open("wb") as file:
            for name in _ARRAY_FIELDS:
                array = getattr(data, name)
                if isinstance(array, np.ndarray):  # others are on the disk already
                    if id(array) not in by_id:
                        by_id[id(array)] = _ArrayInFile.append(array, file)
                    arrays[name] = by_id[id(array)]
                    object.__setattr__(other, name, None)
            file.truncate(max(file.tell(), 1))  # an empty file can't be mapped
        return cls(path, arrays, other)

    def load(self) -> LocalData:
        """The samples, in pages of the file that are copied where they are written to. The file may be deleted then.
        Raises `StorageError` if it can't be read."""
        with storage_errors(f"can't read {self.path}"), self.path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = {place: place.map_array(pages) for place in self.arrays.values()}
        data = copy.copy(self.other)
        for name, place in self.arrays.items():
            object.__setattr__(data, name, mapped[place])
        return data
