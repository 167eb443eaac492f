"""Data sets in idx files, the format of MNIST (yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune_server.simulation.datasets.samples import Samples, assembled

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST = 2**36
"""Bytes of an array beyond which a header is considered damaged."""

_MOST_INFLATED, _MOST_RATIO = 2**30, 100
"""A packed array above both limits, in bytes and in its ratio to the packed length, is not unpacked."""

_DEFLATE = 1032
"""Maximum ratio of deflate (zlib.net/zlib_tech.html)."""

_FILES = {"train": "train", "test": "t10k"}


def read_idx_folder(folder: Path) -> Samples:
    """Read `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files, each plain or as `.gz`.

    Raises:
        DataError: A file is missing, damaged, or labels and images don't fit each other.
    """
    splits = []
    for split, prefix in _FILES.items():
        images, labels = (_file(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if images is None and labels is None and split == "test":
            continue
        if images is None or labels is None:
            raise DataError(f"{folder}: images or labels of {prefix} are missing", expected="both files")
        splits.append((read_idx(images), read_idx(labels), split == "test"))
    return assembled(splits)


def has_idx(folder: Path) -> bool:
    """Whether a folder looks like it has such files."""
    return _file(folder, "train-images-idx3-ubyte") is not None


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read one idx file, gzipped if its name ends in `.gz`.

    Raises:
        DataError: It can't be read, or its header doesn't fit its length.
    """
    try:
        with cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not 1 <= head[3] <= 8:
                raise DataError(f"{path} is not an idx file", expected="0, 0, a type and 1 to 8 axes", got=head.hex())
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise DataError(f"{path} is cut off")
            shape = tuple(np.frombuffer(sizes, ">u4").tolist())
            dtype = np.dtype(_TYPES[head[2]])
            need = math.prod(shape) * dtype.itemsize
            # numpy makes no empty array either whose other sizes are too large.
            if math.prod(max(n, 1) for n in shape) * dtype.itemsize > _MOST:
                raise DataError(f"{path}: sizes", expected=f"at most {_MOST} bytes", got=shape_text(*shape))
            size = path.stat().st_size  # before memory is asked for
            if path.suffix == ".gz" and need > _DEFLATE * size:
                # `read` would ask for all that memory at once.
                raise DataError(f"{path} is cut off", expected=f"{need} bytes", got=f"{size} packed ones")
            if path.suffix == ".gz" and need > max(_MOST_INFLATED, _MOST_RATIO * size):
                raise DataError(
                    f"{path}: sizes",
                    expected=f"at most {_MOST_INFLATED} bytes, or {_MOST_RATIO} times what they take in the file",
                    got=shape_text(*shape),
                    hint="Unpack it with gunzip.",
                )
            if path.suffix != ".gz" and need > size:
                raise DataError(f"{path} is cut off", expected=f"{need} bytes after the header", got=size)
            body = file.read(need + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(body) != need:
        got = f"more than {need}" if len(body) > need else len(body)
        raise DataError(f"{path}: bytes of an array {shape_text(*shape)}", expected=need, got=got)
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _file(folder: Path, name: str) -> Path | None:
    # Unpacked by some programs, the first dash of the suffix becomes a dot.
    for candidate in (name, name.replace("-idx", ".idx")):
        for path in (folder / candidate, folder / f"{candidate}.gz"):
            if path.is_file():
                return path
    return None
