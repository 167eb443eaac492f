"""Puts large arrays of samples into files without a name, from which they are read row by row (`stored_array`)."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import DataError
from fedprune.planning.costs import MAX_SAMPLES_IN_MEMORY
from fedprune_device.data.stored_array import CHUNK_BYTES, Array, Inputs, OpenFiles, StoredArray, file_stamp


def archive_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, spool: Path | None) -> Inputs:
    """An array of samples in an `.npz` file, on the disk if it is large.

    A compressed one is copied to the folder `spool`, or held in memory without one. Damage raises whatever `zipfile` or
    numpy raise.
    """
    # Header, checksum, offset and stamp are of one open file: another one may take the path's place meanwhile.
    if archive.fp is None:
        raise DataError(f"{path} is closed")
    descriptor = archive.fp.fileno()
    stamp = file_stamp(descriptor)
    with archive.open(info) as stream:
        is_compressed = info.compress_type != zipfile.ZIP_STORED
        shape: tuple[int, ...] = ()
        if npy.read_magic(stream) == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(stream)
            begin = info.file_size - prod(shape) * dtype.itemsize
            usable = _should_spool(dtype, shape) and not fortran and stream.tell() == begin
        if not shape or not usable or (is_compressed and spool is None):
            with archive.open(info) as stream_again:
                return np.asarray(npy.read_array(stream_again, allow_pickle=False))
        if is_compressed and spool is not None:
            writer = ArrayWriter(shape, dtype, spool)
            while raw := stream.read(CHUNK_BYTES // dtype.itemsize * dtype.itemsize):
                writer.append(np.frombuffer(raw, dtype))
            return writer.array()
        while stream.read(CHUNK_BYTES):  # to the end, where `zipfile` compares the checksum
            pass
    # The local header's name and extra field may be longer or shorter than those of the archive's directory.
    head = os.pread(descriptor, 30, info.header_offset)
    start = info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    return StoredArray(path.absolute(), stamp, start + begin, dtype, shape)


def spool_large(x: Inputs, spool: Path) -> Inputs:
    """Checked samples in a temporary file in `spool`, which is deleted with this process, if they are large."""
    if isinstance(x, StoredArray) or not _should_spool(x.dtype, x.shape):
        return x
    spooled = gather_chunks((x,), x.shape, x.dtype, spool)
    return replace(spooled, checked=True) if isinstance(spooled, StoredArray) else spooled


def join_arrays(arrays: Sequence[Inputs], dtype: np.dtype[Any], spool: Path | None) -> Inputs:
    """Arrays [n, ...] next to each other, [n, all of their numbers]; in a temporary file in `spool` if it is large."""
    count, width = len(arrays[0]), sum(prod(array.shape[1:]) for array in arrays)

    def rows() -> Iterator[Array]:
        step = max(1, CHUNK_BYTES // max(1, dtype.itemsize * width))
        for rows_slice in (slice(start, start + step) for start in range(0, count, step)):
            flat_arrays = [array[rows_slice] for array in arrays]
            yield np.concatenate([p.reshape(len(p), prod(p.shape[1:])).astype(dtype) for p in flat_arrays], axis=1)

    return gather_chunks(rows(), (count, width), dtype, spool)


def gather_chunks(chunks: Iterable[Array], shape: tuple[int, ...], dtype: np.dtype[Any], spool: Path | None) -> Inputs:
    """One array of this shape from parts of its samples; in a temporary file in `spool` if it is large."""
    writer = ArrayWriter(shape, dtype, spool)
    for chunk in chunks:
        writer.append(chunk)
    return writer.array()


class ArrayWriter:
    """Makes one array [n, ...] of parts of its samples: in a temporary file in `spool` if it is large.

    Raises `StorageError` if the file can't be written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], spool: Path | None) -> None:
        self._shape, self._dtype, self._spool = shape, dtype, spool
        self._parts = [np.zeros((0, *shape[1:]), dtype)]
        self._bytes = 0
        self._file: OpenFiles | None = None
        if spool is not None and _should_spool(dtype, shape):
            with storage_errors(f"can't write a copy of the samples to {spool}"):
                self._file = OpenFiles.in_folder(spool)

    def append(self, part: Array) -> None:
        if self._file is None:
            self._parts.append(part)
            return
        body = np.ascontiguousarray(part, self._dtype).reshape(-1).view(np.uint8).data  # no copy of a large array
        with storage_errors(f"can't write a copy of the samples to {self._spool}"):
            write_all(self._file.fileno(), body, self._bytes)
        self._bytes += len(body)

    def array(self) -> Inputs:
        """The parts as one array, once all are there."""
        if self._file is None:
            return np.concatenate(self._parts)
        return StoredArray(self._file, file_stamp(self._file.fileno()), 0, self._dtype, self._shape)


def _should_spool(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Whether these are many numbers."""
    return dtype.kind in "iufb" and len(shape) > 1 and 4 * prod(shape) > MAX_SAMPLES_IN_MEMORY
