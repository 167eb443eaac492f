"""The envelope of encoded tensors: a head that says how they are packed, and zlib that never gives more than it may.

| offset | bytes | |
|---:|---:|---|
| 0 | 3 | `FPU` |
| 3 | 1 | version, 1 |
| 4 | 1 | how it is packed: 0 not at all, 1 zlib |
| 5 | 3 | zero |
| 8 | 8 | bytes of the tensor file inside, little-endian |
| 16 | | the tensor file, or what zlib made of it |

For zlib the bytes of numbers of more than one byte are sorted: first all first ones, then all second ones. Exponents of
a tensor's numbers are much alike, so that they shrink; their last bits don't, wherever they lie.

A tensor file begins with the length of its header, at most 16 MiB, which no envelope's first bytes can be read as.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ProtocolError

Array = npt.NDArray[Any]

HEAD = 16
_MAGIC = b"FPU\x01"
_RAW, _ZLIB = 0, 1
_LEVEL = 6


def is_packed(raw: bytes | memoryview) -> bool:
    """Whether this is an envelope, and no tensor file."""
    return bytes(raw[:4]) == _MAGIC


def pack(parts: Mapping[str, Array]) -> bytes:
    """Tensors in an envelope, smaller where zlib can make them so. Raises `BundleError` if a tensor's type has no
    safetensors code."""
    squeezer = zlib.compressobj(_LEVEL)
    header = tensorfile.header_of(parts)
    pieces, size = [squeezer.compress(header)], len(header)
    for value in parts.values():
        pieces.append(squeezer.compress(_sorted(value)))
        size += value.nbytes
    pieces.append(squeezer.flush())
    packing = _ZLIB
    if sum(map(len, pieces)) >= size:
        packing, pieces = _RAW, [tensorfile.encode(parts)]
    return b"".join([_MAGIC, bytes([packing, 0, 0, 0]), size.to_bytes(8, "little"), *pieces])


def unpack(raw: bytes, most: int) -> dict[str, Array]:
    """The tensors of an envelope whose tensor file may have `most` bytes; no more are ever allocated. Raises
    `ProtocolError` if it is damaged, or is larger inside than it may be or says."""
    if len(raw) < HEAD or not is_packed(raw) or raw[4] not in (_RAW, _ZLIB) or any(raw[5:8]):
        raise ProtocolError("head of an encoded update", expected="FPU, version 1, packed by zlib or not", got=raw[:8])
    size = int.from_bytes(raw[8:HEAD], "little")
    if size > most:
        raise ProtocolError("size inside an encoded update", expected=f"at most {most} bytes", got=size)
    body = memoryview(raw)[HEAD:]
    if raw[4] == _ZLIB:
        body = memoryview(_inflated(body, size))
    if len(body) != size:
        raise ProtocolError("size inside an encoded update", expected=f"{size} bytes", got=len(body))
    try:
        if raw[4] == _RAW:
            return tensorfile.decode(body)
        return {name: _unsorted(value) for name, value in tensorfile.decode(body).items()}
    except BundleError as error:
        raise ProtocolError(f"encoded update: {error}") from error


def _inflated(body: memoryview, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(body, size + 1)
    except zlib.error as error:
        raise ProtocolError("encoded update can't be inflated; it is damaged") from error
    if len(out) == size and not inflater.eof:
        raise ProtocolError("encoded update is cut short, or larger inside than it says", expected=f"{size} bytes")
    if inflater.unused_data:
        raise ProtocolError("encoded update has something behind its end", got=f"{len(inflater.unused_data)} bytes")
    return out


def _sorted(value: Array) -> bytes:
    """A tensor's bytes, those of equal rank in their numbers side by side."""
    flat = np.ascontiguousarray(value).reshape(-1)
    if value.itemsize == 1 or not flat.size:
        return flat.tobytes()
    return np.ascontiguousarray(flat.view(np.uint8).reshape(-1, value.itemsize).T).tobytes()


def _unsorted(value: Array) -> Array:
    if value.itemsize == 1 or not value.size:
        return value
    bytes_ = value.reshape(-1).view(np.uint8).reshape(value.itemsize, -1)
    return np.ascontiguousarray(bytes_.T).reshape(-1).view(value.dtype).reshape(value.shape)
