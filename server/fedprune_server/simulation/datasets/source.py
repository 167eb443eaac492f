"""Readers of data sets: `.npz` files, MNIST's idx files and binary CIFAR; and which reader a source takes.

Formats: yann.lecun.com/exdb/mnist (idx), cs.toronto.edu/~kriz/cifar.html. Uncompressed arrays of `.npz` files are
memory-mapped.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fedprune.core.disk import is_there
from fedprune.core.errors import DataError, MissingExtraError, remedy, shape_text
from fedprune.core.zip_limits import MOST_INFLATED, MOST_RATIO, check_sizes, why_unreadable
from fedprune_server.simulation.datasets.columns import ENDINGS, Columns, has_arrow
from fedprune_server.simulation.datasets.image_files import read_image_folder
from fedprune_server.simulation.datasets.samples import Samples, assembled

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST = 2**36
"""Bytes of an array beyond which a header is considered damaged."""

_DEFLATE = 1032
"""Maximum ratio of deflate (zlib.net/zlib_tech.html)."""

_FILES = {"train": "train", "test": "t10k"}


def read_idx_folder(folder: Path) -> Samples:
    """Read `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files, each plain or as `.gz`.
    Raises `DataError` if a file is missing, damaged, or labels and images don't fit each other."""
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
    """Read one idx file, gzipped if its name ends in `.gz`. Raises `DataError` if it can't be read, or its header
    doesn't fit its length."""
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
            # numpy also refuses an empty array whose other sizes are too large.
            if math.prod(max(n, 1) for n in shape) * dtype.itemsize > _MOST:
                raise DataError(f"{path}: sizes", expected=f"at most {_MOST} bytes", got=shape_text(*shape))
            size = path.stat().st_size  # before memory is asked for
            if path.suffix == ".gz" and need > _DEFLATE * size:
                # `read` would ask for all that memory at once.
                raise DataError(f"{path} is cut off", expected=f"{need} bytes", got=f"{size} compressed bytes")
            if path.suffix == ".gz" and need > max(MOST_INFLATED, MOST_RATIO * size):
                raise DataError(
                    f"{path}: sizes",
                    expected=f"at most {MOST_INFLATED} bytes, or {MOST_RATIO} times what they take in the file",
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


_PIXELS = 3 * 32 * 32
_PICKLED = ("data_batch_1", "train")
"""First files of the Python version, which is pickled."""


@dataclass(frozen=True)
class _Layout:
    """Files of one data set in its folder, and the labels that precede each image."""

    train: tuple[str, ...]
    test: str
    names: str
    labels: int = 1


_LAYOUTS = (
    _Layout(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
    _Layout(("train.bin",), "test.bin", "fine_label_names.txt", labels=2),
)


def has_cifar(folder: Path) -> bool:
    """Whether a folder looks like one of the data sets, in either version."""
    return _layout(folder) is not None or any((folder / name).is_file() for name in _PICKLED)


def read_cifar(folder: Path) -> Samples:
    """Map the training batches in order, then the test batch. CIFAR-100's fine labels are used. Raises `DataError` if
    files are missing, damaged, or of the Python version."""
    layout = _layout(folder)
    if layout is None:
        raise DataError(
            f"{folder} has no binary CIFAR files",
            expected="data_batch_1.bin or train.bin",
            hint="The Python version is pickled, and nothing is unpickled: download the binary version.",
        )
    splits = []
    for name in (*layout.train, layout.test):
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing", expected=", ".join((*layout.train, layout.test)))
        try:
            splits.append((*_batch(path, layout), name == layout.test))
        except OSError as error:
            raise DataError(f"can't read {path}: {error.strerror or error}") from error
    return assembled(splits, class_names=_class_names(folder / layout.names))


def _layout(folder: Path) -> _Layout | None:
    return next((layout for layout in _LAYOUTS if (folder / layout.train[0]).is_file()), None)


def _batch(path: Path, layout: _Layout) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    row = layout.labels + _PIXELS
    size = path.stat().st_size
    if not size or size % row:
        raise DataError(f"{path}: size", expected=f"a multiple of {row} bytes", got=size)
    table = np.memmap(path, np.uint8, "r", shape=(size // row, row))
    labels = np.array(table[:, layout.labels - 1], np.int64)  # CIFAR-100 has the coarse label first
    return table[:, layout.labels :].reshape(-1, 3, 32, 32), labels


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(line for line in path.read_text(encoding="ascii", errors="replace").split("\n") if line.strip())


Array = npt.NDArray[Any]

_OWNERS = ("owner", "subject", "writer", "domain", "user")
"""Accepted names of the array of owners."""

_KNOWN = frozenset(
    {"x", "y", "x_train", "y_train", "x_test", "y_test", "is_test", "class_names"}
    | {word + end for word in _OWNERS for end in ("", "_train", "_test")}
)
"""Names of the arrays that are read."""

_LOCAL = struct.Struct("<4s5H3I2H")
"""A member's header inside a zip archive (APPNOTE.TXT, 4.3.7)."""

_HINT = "Write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."


def read_npz(path: Path) -> Samples:
    """Read a data set.

    Args:
        path: A file with x_train, y_train, x_test and y_test; or with x, y and optionally is_test, where nonzero marks
            test samples. Optional are `owner` (also subject, writer, domain, user; `owner_train` and `owner_test` in
            the first form) and `class_names`. Other arrays are ignored.

    Raises:
        DataError: It can't be read, an array is missing, or arrays don't fit each other.
    """
    arrays = npz_arrays(path, _KNOWN)
    names = _names(arrays.get("class_names"))
    if "x_train" in arrays or "x" not in arrays:
        _need(path, arrays, ("x_train", "y_train"))
        if ("x_test" in arrays) != ("y_test" in arrays):
            raise DataError("test data", expected="both x_test and y_test, or neither", got=_listed(path))
        splits = [(arrays["x_train"], arrays["y_train"], False)]
        if "x_test" in arrays:
            splits.append((arrays["x_test"], arrays["y_test"], True))
        word = next((w for w in _OWNERS if f"{w}_train" in arrays), None)
        owners = None
        if word is not None:
            owners = [arrays[f"{word}_train"]]
            if "x_test" in arrays:
                _need(path, arrays, (f"{word}_test",))
                owners.append(arrays[f"{word}_test"])
        return assembled(splits, owners=owners, class_names=names)
    _need(path, arrays, ("x", "y"))
    word = next((w for w in _OWNERS if w in arrays), None)
    whole = assembled(
        [(arrays["x"], arrays["y"], False)], owners=None if word is None else [arrays[word]], class_names=names
    )
    if "is_test" not in arrays:
        return whole
    marks = arrays["is_test"]
    if marks.dtype.kind not in "biu" or marks.shape != whole.labels.shape:
        raise DataError("is_test", expected=f"true or false [{len(whole)}]", got=f"{marks.dtype} {marks.shape}")
    return Samples(
        whole.parts, whole.labels, np.asarray(marks) != 0, whole.owners, whole.owner_names, whole.class_names
    )


def npz_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """Arrays of a file, memory-mapped read-only where they are not compressed. Nothing is unpickled.

    Args:
        names: Arrays to read, if present; None for all. Others are not unpacked.

    Raises:
        DataError: It can't be read, is not an `.npz` file of plain arrays, or a compressed array exceeds the limits.
    """
    try:
        arrays: dict[str, Array] = {}
        with path.open("rb") as raw, zipfile.ZipFile(raw) as archive, np.load(path, allow_pickle=False) as file:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if names is not None and name not in names:
                    continue
                check_sizes([member], f"{path}: {name[:80]}", DataError)
                mapped = _mapped(path, raw, member) if member.filename.endswith(".npy") else None
                arrays[name] = file[name] if mapped is None else mapped
        return arrays
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=remedy(error)) from error
    except DataError:
        raise
    except Exception as error:  # on damaged files zipfile, numpy and numpy's header parser may raise anything
        raise DataError(f"{path} is not an .npz file of plain arrays{why_unreadable(error)}", hint=_HINT) from error


def _mapped(path: Path, raw: Any, member: zipfile.ZipInfo) -> Array | None:
    """The array as a read-only map of the file; None if it is compressed, encrypted, tiny or of objects."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size < 2**16:
        return None
    raw.seek(member.header_offset)
    header = _LOCAL.unpack(raw.read(_LOCAL.size))
    if header[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a member's header is damaged")
    begin = member.header_offset + _LOCAL.size + header[9] + header[10]
    raw.seek(begin)
    version = npy.read_magic(raw)
    if version not in ((1, 0), (2, 0)):
        return None
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(raw)
    if dtype.hasobject or not all(shape):
        return None
    at = raw.tell()
    if at + dtype.itemsize * int(np.prod(shape, dtype=object)) != begin + member.file_size:
        raise ValueError(f"{member.filename} is cut off")
    return np.memmap(path, dtype, "r", at, shape, "F" if fortran else "C")


def _names(array: Array | None) -> tuple[str, ...]:
    if array is None:
        return ()
    if array.dtype.kind != "U" or array.ndim != 1:
        raise DataError("class_names", expected="texts [classes]", got=f"{array.dtype} {array.shape}")
    return tuple(map(str, array.tolist()))


def _need(path: Path, arrays: dict[str, Array], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in arrays:
            raise DataError(f"{path}: array {name!r} is missing", got=_listed(path), hint=_HINT)


def _listed(path: Path) -> str:
    """Names of all arrays of a file."""
    with zipfile.ZipFile(path) as archive:
        return ", ".join(n.removesuffix(".npy") for n in archive.namelist()) or "nothing"


VARIABLE = "FEDPRUNE_DATA"
"""Environment variable with a folder in which missing sources are searched."""

_INNER = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python", "raw", "MNIST/raw")
"""Folders of archives and of torchvision, below the folder that a user names."""


def read_samples(
    source: str | Path, columns: Columns | None = None, *, size: tuple[int, int] | None = None, colour: bool = True
) -> Samples:
    """Read a data set.

    Args:
        source: A `.npz`, Arrow or Parquet file, or a folder: one that `datasets` saved or with such files, MNIST's idx
            files, CIFAR's binary files, or images in a folder per class. A path that doesn't exist is searched in
            `FEDPRUNE_DATA`, also with the extension `.npz`.
        columns: Columns of an Arrow or Parquet file.
        size: Height and width to which images are scaled.
        colour: Whether images are read in colour.

    Raises:
        DataError: It doesn't exist, or can't be read; the message names the file.
    """
    path = found(source)
    with _named(path):
        return _read(path, columns, size, colour)


def _read(path: Path, columns: Columns | None, size: tuple[int, int] | None, colour: bool) -> Samples:
    if path.suffix in ENDINGS if path.is_file() else has_arrow(path):
        try:
            from fedprune_server.simulation.datasets.arrow_files import read_arrow
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"Arrow and Parquet files need {error.name}", extra="parquet") from error
        return read_arrow(path, columns or Columns(), size=size, colour=colour)
    if columns is not None:
        raise DataError(
            "x, y or owner of [data]", expected="none: columns are those of Arrow and Parquet files", got="some"
        )
    if path.is_file():
        return read_npz(path)
    for folder in (path, *(path / inner for inner in _INNER)):
        if has_cifar(folder):
            return read_cifar(folder)
        if has_idx(folder):
            return read_idx_folder(folder)
    return read_image_folder(path, size=size, colour=colour)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's name to an error that doesn't have it."""
    try:
        yield
    except DataError as error:
        if str(path) in error.what:
            raise
        raise DataError(f"{path}: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error


def found(source: str | Path) -> Path:
    """The path of a source. Raises `DataError` if it doesn't exist; the message names the searched places."""
    named = Path(source)
    places = [named]
    if not named.is_absolute() and (root := os.environ.get(VARIABLE)):
        places += [Path(root) / named, Path(root) / f"{named}.npz"]
    for place in places:
        if is_there(place):
            return place
    raise DataError(
        f"data {str(source)!r}",
        expected="a .npz file or a folder that exists",
        got=f"nothing at {', '.join(str(p.absolute()) for p in places)}",
        hint="" if os.environ.get(VARIABLE) else f"Or set {VARIABLE} to the folder that holds it.",
    )
