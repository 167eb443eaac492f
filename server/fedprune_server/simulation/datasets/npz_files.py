"""Data sets in `.npz` files, whose uncompressed arrays are memory-mapped instead of read."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fedprune.core.disk import open_file
from fedprune.core.errors import DataError, path_remedy
from fedprune.core.zip_limits import check_sizes, plain_array, unreadable_reason
from fedprune_server.simulation.datasets.samples import Samples, assemble_samples

Array = npt.NDArray[Any]

_OWNER_NAMES = ("owner", "subject", "writer", "domain", "user")  # accepted names of the array of owners

# Names of the arrays that are read.
_ARRAY_NAMES = frozenset(
    {"x", "y", "x_train", "y_train", "x_test", "y_test", "is_test", "class_names"}
    | {word + end for word in _OWNER_NAMES for end in ("", "_train", "_test")}
)

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # a member's header inside a zip archive (APPNOTE.TXT, 4.3.7)

_WRITE_HINT = "Write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."


def read_npz(path: Path) -> Samples:
    """Read a data set.

    Raises `DataError` if it can't be read, an array is missing, or arrays don't fit each other.

    Args:
        path: A file with x_train, y_train, x_test and y_test; or with x, y and optionally is_test, where nonzero marks
            test samples. Optional are `owner` (also subject, writer, domain, user; `owner_train` and `owner_test` in
            the first form) and `class_names`. Other arrays are ignored.
    """
    arrays = npz_arrays(path, _ARRAY_NAMES)
    names = _class_names(arrays.get("class_names"))
    if "x_train" in arrays or "x" not in arrays:
        _require_arrays(path, arrays, ("x_train", "y_train"))
        if ("x_test" in arrays) != ("y_test" in arrays):
            raise DataError("test data", expected="both x_test and y_test, or neither", got=_stored_names(path))
        ends = ["_train", "_test"] if "x_test" in arrays else ["_train"]
    else:
        _require_arrays(path, arrays, ("x", "y"))
        ends = [""]
    splits = [(arrays[f"x{end}"], arrays[f"y{end}"], end == "_test") for end in ends]
    owner_name, owners = next((word for word in _OWNER_NAMES if word + ends[0] in arrays), None), None
    if owner_name is not None:
        _require_arrays(path, arrays, tuple(owner_name + end for end in ends))
        owners = [arrays[owner_name + end] for end in ends]
    samples = assemble_samples(splits, owners=owners, class_names=names)
    if "is_test" not in arrays or ends != [""]:
        return samples
    marks = arrays["is_test"]
    if marks.dtype.kind not in "biu" or marks.shape != samples.labels.shape:
        raise DataError("is_test", expected=f"true or false [{len(samples)}]", got=f"{marks.dtype} {marks.shape}")
    return replace(samples, is_test=np.asarray(marks) != 0)


def npz_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """Arrays of a file, memory-mapped read-only where they are not compressed. Nothing is unpickled.

    Only arrays of these `names` are unpacked; None means all. Raises `DataError` if it can't be read, is not an `.npz`
    file of plain arrays, or a compressed array exceeds the limits.
    """
    try:
        arrays: dict[str, Array] = {}
        with open_file(path) as raw, zipfile.ZipFile(raw) as archive, np.load(path, allow_pickle=False) as file:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if names is not None and name not in names:
                    continue
                check_sizes([member], f"{path}: {name[:80]}", DataError)
                mapped = _map_array(path, raw, member) if member.filename.endswith(".npy") else None
                arrays[name] = plain_array(name, file[name]) if mapped is None else mapped
        return arrays
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=path_remedy(error)) from error
    except DataError:
        raise
    except Exception as error:  # on damaged files zipfile, numpy and numpy's header parser may raise anything
        what = f"{path} is not an .npz file of plain arrays{unreadable_reason(error)}"
        raise DataError(what, hint=_WRITE_HINT) from error


def _map_array(path: Path, raw: Any, member: zipfile.ZipInfo) -> Array | None:
    """The array as a read-only map of the file; None if it is compressed, encrypted, tiny or of objects."""
    # A map of a few KiB costs a file descriptor, and saves nothing.
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.file_size < 2**16:
        return None
    raw.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    if header[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a member's header is damaged")
    # The local header's own lengths: those of the archive's directory may differ.
    member_start = member.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
    raw.seek(member_start)
    version = npy.read_magic(raw)
    if version not in ((1, 0), (2, 0)):
        return None
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(raw)
    if dtype.hasobject or not all(shape):
        return None
    data_start = raw.tell()
    # A map beyond the end of the file would end the process by SIGBUS when it is read.
    if data_start + dtype.itemsize * int(np.prod(shape, dtype=object)) != member_start + member.file_size:
        raise ValueError(f"{member.filename} is cut off")
    return np.memmap(path, dtype, "r", data_start, shape, "F" if fortran else "C")


def _class_names(array: Array | None) -> tuple[str, ...]:
    if array is None:
        return ()
    if array.dtype.kind != "U" or array.ndim != 1:
        raise DataError("class_names", expected="texts [classes]", got=f"{array.dtype} {array.shape}")
    return tuple(map(str, array.tolist()))


def _require_arrays(path: Path, arrays: dict[str, Array], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in arrays:
            raise DataError(f"{path}: array {name!r} is missing", got=_stored_names(path), hint=_WRITE_HINT)


def _stored_names(path: Path) -> str:
    """Names of all arrays of a file."""
    with zipfile.ZipFile(path) as archive:
        return ", ".join(n.removesuffix(".npy") for n in archive.namelist()) or "nothing"
