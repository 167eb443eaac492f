"""Named tensors as canonical safetensors bytes: the one form in which weights are stored, sent and named.

Canonical means: tensors in the given order without gaps, header padded with spaces so that data begins at a multiple
of 64. The same tensors in the same order always give the same bytes, so their sha256 can be their name, and offsets
depend on names and shapes alone, so new weights of the same shapes can take the place of old ones inside a file that an
ONNX model refers to.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fedprune.core.errors import BundleError, ProtocolError, path_remedy, value_text
from fedprune.core.validation import is_whole

Array = npt.NDArray[Any]

# A cache line. A mapping begins at a page, so that the arrays in a mapped file of one type are aligned in memory.
ALIGNMENT = 64
# Enough for some 100,000 tensors. Parsing the 100 MB that safetensors allows takes more memory than a board has.
MAX_HEADER_BYTES = 16 * 2**20
# Dimensions of a tensor. Weights have at most five; numpy itself stops at 32 or 64, by version.
MAX_RANK = 8

# Far beyond any file, and far below where products of dimensions leave 64 bits.
_MAX_BYTES = 2**48

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPE_CODES = {np.dtype(v): k for k, v in _DTYPES.items()}


def header_for_specs(
    specs: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length and padded JSON header for tensors of these names, codes ("F32") and shapes. Raises `BundleError` if a
    name comes twice or is reserved."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, code, shape in specs:
        if name in entries or name == "__metadata__":
            raise BundleError(f"tensor name {name!r} comes twice or is reserved")
        size = math.prod(shape) * np.dtype(_DTYPES[code]).itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def encode(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Canonical bytes of `tensors`, in their order. Raises `BundleError` if a tensor's type has no safetensors code."""
    # One join of views: on boards a further copy of all weights is memory that they may not have.
    return b"".join([header_for_tensors(tensors, metadata), *map(_tensor_bytes, tensors.values())])


def header_for_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header that `encode` begins with; the first tensor follows it. Raises `BundleError` if a tensor's
    type has no safetensors code."""
    rows = []
    for name, value in tensors.items():
        code = _DTYPE_CODES.get(value.dtype)
        if code is None:
            raise BundleError(f"type of tensor {name}", expected=", ".join(_DTYPES), got=value.dtype)
        rows.append((name, code, value.shape))
    return header_for_specs(rows, metadata)


def _tensor_bytes(value: Array) -> memoryview:
    """A tensor's bytes in C order, whatever its layout in memory."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def tensor_offsets(raw: bytes | memoryview) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The place of each tensor in a file: name to (code, shape, absolute start, end). Raises `BundleError` if the
    header is damaged, has gaps or overlaps, doesn't cover the file exactly, or a shape is one that numpy can't hold."""
    view = memoryview(raw)
    length = header_length(view)
    try:
        table = json.loads(bytes(view[8 : 8 + length]))
        table.pop("__metadata__", None)
        rows = [
            (
                str(k),
                str(v["dtype"]),
                tuple(_checked_size(dimension) for dimension in v["shape"]),
                _checked_size(v["data_offsets"][0]),
                _checked_size(v["data_offsets"][1]),
            )
            for k, v in table.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BundleError(f"tensor file header is damaged ({type(error).__name__})") from error
    tensor_places: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    expected_start, base = 0, 8 + length
    for name, code, shape, start, end in sorted(rows, key=lambda r: (r[3], r[4])):
        if code not in _DTYPES:
            raise BundleError(f"type of tensor {value_text(name)}", expected=", ".join(_DTYPES), got=value_text(code))
        size = extent = np.dtype(_DTYPES[code]).itemsize
        for dimension in shape:
            size *= dimension
            extent *= max(dimension, 1)  # numpy refuses an empty array whose other dimensions are too large
        if len(shape) > MAX_RANK or extent >= _MAX_BYTES:
            limits = f"at most {MAX_RANK} dimensions and less than {_MAX_BYTES} bytes"
            raise BundleError(f"shape of tensor {value_text(name)}", expected=limits, got=repr(shape)[:80])
        expected_range = (expected_start, expected_start + size)
        if (start, end) != expected_range:
            what = f"tensor {value_text(name)} doesn't lie where its shape says"
            raise BundleError(what, expected=expected_range, got=(start, end))
        tensor_places[name] = (code, shape, base + start, base + end)
        expected_start = end
    if base + expected_start != len(view):
        problem = "cut short" if len(view) < base + expected_start else "too long"
        raise BundleError(f"tensor file is {problem}", expected=f"{base + expected_start} bytes", got=len(view))
    return tensor_places


def header_length(raw: bytes | memoryview) -> int:
    """Bytes of a file's header, which begins after the first 8. Raises `BundleError` if the file is cut short, or no
    header is as long."""
    if len(raw) < 8:
        raise BundleError("tensor file is cut short", expected="at least 8 bytes", got=len(raw))
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(raw):
        raise BundleError("tensor file is cut short or its header is damaged", expected=f"{length} bytes of header")
    return length


def array_at(raw: bytes | memoryview, code: str, shape: tuple[int, ...], start: int, end: int) -> Array:
    """The tensor at one place of `tensor_offsets`, as a read-only view."""
    return np.frombuffer(memoryview(raw)[start:end], dtype=_DTYPES[code]).reshape(shape)


def decode(raw: bytes | memoryview) -> dict[str, Array]:
    """Tensors of a file, as read-only views on its bytes. Raises `BundleError` as `tensor_offsets`."""
    tensors: dict[str, Array] = {}
    for name, (code, shape, start, end) in tensor_offsets(raw).items():
        tensors[name] = array_at(raw, code, shape, start, end)
    return tensors


def load_tensors(path: Path) -> dict[str, Array]:
    """Tensors of a file on disk. Raises `BundleError`, which names the file, if it can't be read or is damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    try:
        return decode(raw)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def map_tensors(path: Path) -> dict[str, Array]:
    """Tensors of a file on disk as read-only views of its mapping. Raises as `load_tensors`."""
    try:
        return decode(np.memmap(path, np.uint8, "r").data)
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    except (BundleError, ValueError) as error:  # numpy maps no empty file
        raise BundleError(f"{path}: {error}") from error


def sha256_hex(raw: bytes | memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()


def _checked_size(value: object) -> int:
    if not is_whole(value, 0, 2**48 - 1):
        raise ValueError(value)
    return value


_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def float32_array(raw: bytes, shape: Sequence[int], what: str) -> npt.NDArray[np.float32]:
    """Decode the bytes of a `.npy` file with an array of this shape. Raises `ProtocolError`, which names `what`, if
    they hold anything else.

    Nothing is unpickled, and no memory is taken for a size that only the header claims.
    """
    file = io.BytesIO(raw)
    try:
        file_shape, is_fortran_order, dtype = _HEADER_READERS[npy.read_magic(file)](file)
    except Exception as error:  # numpy's parser of others' headers raises whatever its parts raise
        raise ProtocolError(f"{what} is no array in NumPy's format ({type(error).__name__})") from error
    if dtype.newbyteorder("<") != np.dtype("<f4"):
        raise ProtocolError(f"type of {what}", expected="float32", got=value_text(str(dtype)))
    if tuple(file_shape) != tuple(shape):
        raise ProtocolError(f"shape of {what}", expected=tuple(shape), got=value_text(str(tuple(file_shape))))
    data = memoryview(raw)[file.tell() :]
    if len(data) != 4 * int(np.prod(shape, dtype=np.int64)):
        raise ProtocolError(f"{what} is cut short or too long", expected=tuple(shape), got=f"{len(data)} bytes")
    flat = np.frombuffer(data, dtype)
    return np.array(flat.reshape(shape, order="F" if is_fortran_order else "C"), np.float32, order="C")
