"""The envelope of encoded tensors: a header, and zlib with a bound on the unpacked size.

| offset | bytes | |
|---:|---:|---|
| 0 | 3 | `FPU` |
| 3 | 1 | version, 1 |
| 4 | 1 | packing: 0 none, 1 zlib |
| 5 | 3 | zero |
| 8 | 8 | bytes of the tensor file inside, little-endian |
| 16 | | the tensor file, or what zlib made of it |

For zlib the bytes of numbers of more than one byte are grouped by their position: first all first bytes, then all
second ones. The exponents of a tensor's numbers are much alike, and shrink when they stand together; their last bits
never do.

A plain tensor file can't be taken for an envelope: it begins with the length of its header, at most 16 MiB, and the
first bytes of an envelope are a larger number.

Sparse tensors have the indices of their elements as a bitmap or as gaps, whichever is smaller. A gap is the number of
elements skipped since the index before, as a sum of bytes: after 255 the next byte belongs to the same gap. Whatever
bytes an attacker chooses, the indices that are read rise, and none comes twice.

Two small codes share a byte, as the digits of a number, the first in the higher place.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ProtocolError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

# A byte of a gap after which the gap goes on.
_FULL_BYTE = 255


def largest_indices(values: npt.NDArray[np.float32], count: int) -> Indices:
    """Ascending indices of the largest elements by magnitude; of equal ones the first, on any processor."""
    # By a threshold, because argpartition picks any of equal elements, by processor and version.
    magnitudes = np.abs(values)
    threshold = np.partition(magnitudes, values.size - count)[values.size - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - above.size]
    indices: Indices = np.sort(np.concatenate([above, equal])).astype(np.int64)
    return indices


def to_gaps(indices: Indices) -> Bytes:
    gaps = np.diff(indices, prepend=-1) - 1
    full_bytes = gaps // _FULL_BYTE
    encoded = np.full(int(full_bytes.sum()) + gaps.size, _FULL_BYTE, np.uint8)
    encoded[np.cumsum(full_bytes + 1) - 1] = gaps % _FULL_BYTE
    return encoded


def from_gaps(gaps: Bytes, count: int, size: int, what: str) -> Indices:
    """The `count` indices in gaps, of a tensor with `size` elements. Raises `ProtocolError` if their number is another,
    or they reach beyond the tensor."""
    ends = gaps != _FULL_BYTE
    if gaps.ndim != 1 or not gaps.size or not ends[-1] or int(ends.sum()) != count:
        raise ProtocolError(f"indices of {what}", expected=f"{count} of them", got=f"{int(ends.sum())} or cut short")
    indices: Indices = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(count)
    if indices[-1] >= size:
        raise ProtocolError(f"indices of {what}", expected=f"below {size}", got=int(indices[-1]))
    return indices


def to_bitmap(indices: Indices, size: int) -> Bytes:
    """Indices as a bit for each element, the first in the highest bit."""
    bits = np.zeros(size, np.bool_)
    bits[indices] = True
    return np.packbits(bits)


def from_bitmap(bitmap: Bytes, count: int, size: int, what: str) -> Indices:
    """Indices of a bitmap; arguments and errors are those of `from_gaps`."""
    if bitmap.shape != (bitmap_bytes(size),):
        raise ProtocolError(f"bitmap of {what}", expected=f"{bitmap_bytes(size)} bytes", got=bitmap.shape)
    bits = np.unpackbits(bitmap)
    indices: Indices = np.flatnonzero(bits).astype(np.int64)
    if indices.size != count or bits[size:].any():
        raise ProtocolError(f"bitmap of {what}", expected=f"{count} of {size} bits", got=f"{indices.size} bits")
    return indices


def bitmap_bytes(size: int) -> int:
    return -(-size // 8)


def to_pairs(codes: npt.NDArray[np.int8], steps: int) -> Bytes:
    """Codes from −steps to steps, at most 7, as bytes of two codes each; after an odd last code the digit is 0."""
    digits = np.zeros(codes.size + codes.size % 2, np.uint8)
    digits[: codes.size] = codes + np.int8(steps)
    packed: Bytes = digits[::2] * np.uint8(2 * steps + 1) + digits[1::2]
    return packed


def from_pairs(packed: Bytes, steps: int, size: int, what: str) -> npt.NDArray[np.int8]:
    """The `size` codes that `to_pairs` packed. Raises `ProtocolError` if a byte holds something else."""
    base = np.uint8(2 * steps + 1)
    digits = np.stack(np.divmod(packed, base), axis=-1).reshape(-1)
    if int(digits.max()) >= base or digits[size:].any():
        raise ProtocolError(f"codes of {what}", expected=f"{size} from {-steps} to {steps}", got="other bytes")
    codes: npt.NDArray[np.int8] = digits[:size].astype(np.int8) - np.int8(steps)
    return codes


Array = npt.NDArray[Any]

ENVELOPE_HEADER_BYTES = 16
_MAGIC = b"FPU\x01"
_RAW, _ZLIB = 0, 1
# zlib's default: higher levels search longer for repetitions, which numbers hardly have.
_ZLIB_LEVEL = 6


def is_packed(raw: bytes | memoryview) -> bool:
    """Whether an update is packed, rather than plain safetensors."""
    return bytes(raw[:4]) == _MAGIC


def pack_tensors(tensors: Mapping[str, Array], strategy: int = zlib.Z_FILTERED) -> bytes:
    """Tensors in an envelope, smaller where zlib can make them so, by one of its strategies. Raises `BundleError` if a
    tensor's type has no safetensors code."""
    # Filtered: numbers repeat themselves only by chance, so that Huffman codes gain more than searching for
    # repetitions.
    compressor = zlib.compressobj(_ZLIB_LEVEL, strategy=strategy)
    header = tensorfile.header_for_tensors(tensors)
    chunks, size = [compressor.compress(header)], len(header)
    for value in tensors.values():
        chunks.append(compressor.compress(_group_bytes(value)))
        size += value.nbytes
    chunks.append(compressor.flush())
    packing = _ZLIB
    if sum(map(len, chunks)) >= size:
        packing, chunks = _RAW, [tensorfile.encode(tensors)]
    return b"".join([_MAGIC, bytes([packing, 0, 0, 0]), size.to_bytes(8, "little"), *chunks])


def unpack_tensors(raw: bytes, max_bytes: int) -> dict[str, Array]:
    """The tensors of an envelope whose tensor file may have `max_bytes` bytes; no more are ever allocated. Raises
    `ProtocolError` if it is damaged, or larger inside than is allowed or than it claims."""
    if len(raw) < ENVELOPE_HEADER_BYTES or not is_packed(raw) or raw[4] not in (_RAW, _ZLIB) or any(raw[5:8]):
        raise ProtocolError("head of an encoded update", expected="FPU, version 1, packed by zlib or not", got=raw[:8])
    size = int.from_bytes(raw[8:ENVELOPE_HEADER_BYTES], "little")
    if size > max_bytes:
        raise ProtocolError("size inside an encoded update", expected=f"at most {max_bytes} bytes", got=size)
    body = memoryview(raw)[ENVELOPE_HEADER_BYTES:]
    if raw[4] == _ZLIB:
        body = memoryview(_inflate(body, size))
    if len(body) != size:
        raise ProtocolError("size inside an encoded update", expected=f"{size} bytes", got=len(body))
    try:
        if raw[4] == _RAW:
            return tensorfile.decode(body)
        return {name: _ungroup_bytes(value) for name, value in tensorfile.decode(body).items()}
    except BundleError as error:
        raise ProtocolError(f"encoded update: {error}") from error


def _inflate(body: memoryview, size: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        # One byte more than claimed, so that a longer stream shows as too long instead of as complete.
        inflated = inflater.decompress(body, size + 1)
    except zlib.error as error:
        raise ProtocolError("encoded update can't be inflated; it is damaged") from error
    if len(inflated) == size and not inflater.eof:
        raise ProtocolError("encoded update is cut short, or larger inside than it says", expected=f"{size} bytes")
    if inflater.unused_data:
        raise ProtocolError("encoded update has something behind its end", got=f"{len(inflater.unused_data)} bytes")
    return inflated


def _group_bytes(value: Array) -> bytes:
    """A tensor's bytes grouped by their position within the numbers."""
    flat = np.ascontiguousarray(value).reshape(-1)
    if value.itemsize == 1 or not flat.size:
        return flat.tobytes()
    return np.ascontiguousarray(flat.view(np.uint8).reshape(-1, value.itemsize).T).tobytes()


def _ungroup_bytes(value: Array) -> Array:
    if value.itemsize == 1 or not value.size:
        return value
    bytes_ = value.reshape(-1).view(np.uint8).reshape(value.itemsize, -1)
    return np.ascontiguousarray(bytes_.T).reshape(-1).view(value.dtype).reshape(value.shape)
