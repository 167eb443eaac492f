"""Decoded images on the disk, as bytes, from which batches are read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import DataError
from fedprune_device.data.dataset import Shape
from fedprune_device.data.image_decoding import TYPES, Pixels
from fedprune_device.data.stored_array import Copy, StoredArray


class RoomError(DataError):
    """Decoded images have no more room."""


class DecodedImages:
    """A file without a name that holds images in the size that a model takes.

    Args:
        pixels: How the model takes images.
        shape: The model's input.
        folder: Where the file is; None for the system's folder for temporary files.
        room: Bytes that it may take.

    Raises:
        StorageError: It can't be made.
    """

    def __init__(self, pixels: Pixels, shape: Shape, folder: Path | None, room: int) -> None:
        self._pixels, self._shape, self._room = pixels, shape, room
        self._rows: dict[str, int] = {}
        self._sample: tuple[int, ...] = ()
        with storage_errors("can't make a file for decoded images"):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = Copy(os.dup(file.fileno()))

    def serves(self, shape: Shape, wanted: Collection[str]) -> bool:
        """Whether it has this shape, at least half of its images are wanted, and room for all that are."""
        useless = sum(name not in wanted for name in self._rows)
        lacking = sum(name not in self._rows for name in wanted)
        fits = (len(self._rows) + lacking) * prod(self._sample) <= self._room
        return self._shape == shape and 2 * useless <= len(self._rows) and (fits or not useless)

    def row(self, name: str, read: Callable[[], bytes]) -> int:
        """The row of an image, which is decoded if it is not there yet.

        Args:
            name: Its digest.
            read: Reads its file.

        Raises:
            RoomError: There is no room for it.
            DataError: It can't be decoded, or the model doesn't take images.
            StorageError: The disk is full or fails.
            OSError: Its file can't be read.
        """
        if name in self._rows:
            return self._rows[name]
        if self._sample and (len(self._rows) + 1) * prod(self._sample) > self._room:
            raise RoomError("room for decoded images", expected=f"at most {self._room} bytes", got="more")
        decoded = self._pixels.decoded(read(), tuple(TYPES.values()), self._shape)
        self._sample = decoded.shape
        with storage_errors("can't write decoded images"):
            write_all(self._file.fileno(), decoded.tobytes(), len(self._rows) * decoded.size)
        self._rows[name] = len(self._rows)
        return self._rows[name]

    def samples(self, rows: npt.NDArray[np.int64]) -> StoredArray:
        """Some images as samples, [n, colours, height, width]."""
        height, width, colours = self._sample
        return StoredArray(
            self._file,
            None,
            0,
            np.dtype(np.uint8),
            (len(self._rows), *self._sample),
            rows,
            checked=True,
            convert=self._pixels.numbers,
            sample=(colours, height, width),
        )
