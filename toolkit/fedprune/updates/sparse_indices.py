"""Which of a tensor's elements travel: rising indices, as a bitmap or as gaps, whichever is smaller.

Gaps: for each index the number of elements skipped since the one before, in bytes that are added up; 255 says that the
next byte belongs to the same gap. However the bytes are chosen, indices that are read rise and none comes twice.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ProtocolError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_MORE = 255


def largest(values: npt.NDArray[np.float32], count: int) -> Indices:
    """Indices of the largest elements by magnitude, rising; of equal ones the first, on any processor."""
    size = np.abs(values)
    least = np.partition(size, values.size - count)[values.size - count]
    above = np.flatnonzero(size > least)
    level = np.flatnonzero(size == least)[: count - above.size]
    found: Indices = np.sort(np.concatenate([above, level])).astype(np.int64)
    return found


def to_gaps(indices: Indices) -> Bytes:
    """Rising indices as gaps."""
    gaps = np.diff(indices, prepend=-1) - 1
    more = gaps // _MORE
    out = np.full(int(more.sum()) + gaps.size, _MORE, np.uint8)
    out[np.cumsum(more + 1) - 1] = gaps % _MORE
    return out


def from_gaps(gaps: Bytes, count: int, size: int, what: str) -> Indices:
    """The `count` indices that gaps give, of a tensor with `size` elements. Raises `ProtocolError` if there are others,
    or they reach beyond the tensor."""
    ends = gaps != _MORE
    if gaps.ndim != 1 or not gaps.size or not ends[-1] or int(ends.sum()) != count:
        raise ProtocolError(f"indices of {what}", expected=f"{count} of them", got=f"{int(ends.sum())} or cut short")
    found: Indices = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(count)
    if found[-1] >= size:
        raise ProtocolError(f"indices of {what}", expected=f"below {size}", got=int(found[-1]))
    return found


def to_bitmap(indices: Indices, size: int) -> Bytes:
    """Indices as a bit for each element, the first in the highest bit."""
    bits = np.zeros(size, np.bool_)
    bits[indices] = True
    return np.packbits(bits)


def from_bitmap(bitmap: Bytes, count: int, size: int, what: str) -> Indices:
    """Indices that a bitmap says; arguments and errors are those of `from_gaps`."""
    if bitmap.shape != (bitmap_bytes(size),):
        raise ProtocolError(f"bitmap of {what}", expected=f"{bitmap_bytes(size)} bytes", got=bitmap.shape)
    bits = np.unpackbits(bitmap)
    found: Indices = np.flatnonzero(bits).astype(np.int64)
    if found.size != count or bits[size:].any():
        raise ProtocolError(f"bitmap of {what}", expected=f"{count} of {size} bits", got=f"{found.size} bits")
    return found


def bitmap_bytes(size: int) -> int:
    """Bytes of a bitmap of so many elements."""
    return -(-size // 8)
