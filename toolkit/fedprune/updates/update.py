"""An update in fewer bytes: each trained tensor as its difference to the weights that were sent, in a codec.

What wasn't trained (batch-norm statistics), and squared gradients, travel as they are. Inside the envelope
(`fedprune.updates.packing`) is a tensor file with, for a trained tensor `n`:

| part | type | codec | |
|---|---|---|---|
| `n::bits` | I32, as `n` | `zlib` | d = difference of the bits of both floats, modulo 2³², as 2·d or −2·d − 1 |
| `n::half` | F16, as `n` | `float16`; `top-k` for small tensors | the difference |
| `n::codes`, `n::scales` | I8, as `n`; F32 | `int8` | difference = code · scale, with a scale per row or for all |
| `n::codes`, `n::scales`, `n::gaps` or `n::bitmap` | I8, `[k]`; F32, `[1]`; U8 | `top-k` | the same for k places |

What a codec leaves out (error feedback: Seide et al. 2014; Stich et al. 2018, "Sparsified SGD with memory") is given
back to be added to the next difference. With `n::squares` absolute values are meant, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError, shown
from fedprune.model import step_contract
from fedprune.updates import packing
from fedprune.updates.codecs import Codec

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
Parts = dict[str, Array]
Shape = tuple[int, ...]

STEPS = 127
"""Codes go from −127 to 127."""

ROW = 64
"""Rows of so many elements have scales of their own; with shorter ones these would weigh too much."""

SMALL = 256
"""Smaller tensors are sent whole by `top-k`: there is little to be had."""

_BITS, _HALF, _CODES, _SCALES, _GAPS, _BITMAP = "::bits", "::half", "::codes", "::scales", "::gaps", "::bitmap"

PARTS = {"zlib": _BITS, "float16": _HALF}
"""Where a codec has a single part of the tensor's shape: how its name ends."""


def encode(
    codec: Codec,
    tensors: Mapping[str, Float32],
    sent: Mapping[str, Float32],
    trained: Collection[str],
    residual: Mapping[str, Float32] | None = None,
) -> tuple[bytes, Tensors]:
    """An update in a codec: its bytes, and what they leave out, for codecs with feedback.

    Raises `ProtocolError` if a difference can't be coded: it is not finite or too large for the codec.

    Args:
        sent: The weights that training started from, as they were sent.
        trained: Names of the tensors that are coded as differences.
        residual: By name what earlier updates left out of these tensors.
    """
    parts: Parts = {}
    left: Tensors = {}
    for name, value in tensors.items():
        if name not in trained or not value.size:
            parts[name] = value
            continue
        if codec.name == "zlib":
            moved = _integers(value) - _integers(sent[name])
            # Small numbers of either sign become small unsigned ones, whose high bytes are all 0.
            parts[name + _BITS] = (moved << 1) ^ (moved >> 31)
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            difference = value - sent[name]
            if residual is not None and name in residual:
                difference += residual[name]
        if not np.isfinite(difference).all():
            raise ProtocolError(f"difference of {name} in an update", expected="finite numbers")
        parts |= _coded(codec, name, difference)
        if codec.feedback:
            left[name] = difference - _difference(codec, name, parts, value.shape)
    return packing.pack(parts), left


def decode(codec: Codec, raw: bytes, sent: Mapping[str, Float32], trained: Collection[str]) -> Tensors:
    """The tensors of an update; the fold checks whether all are there, and their values. `sent` and `trained` are as
    for `encode`.

    Raises `ProtocolError` if it is damaged, larger than these tensors can be, or holds something else.
    """
    squares = {step_contract.squares(n): sent[n] for n in sent if n in trained}
    allowed = {**sent, **squares}
    parts = packing.unpack(raw, _inner_bound(codec, {n: v.shape for n, v in allowed.items()}, trained))
    return read(codec, parts, allowed, trained)


def read(codec: Codec, parts: Mapping[str, Array], allowed: Mapping[str, Float32], trained: Collection[str]) -> Tensors:
    """Tensors out of the parts that an envelope holds.

    Trained tensors are the difference to those in `allowed`, of the others the shape counts; some may be missing.
    Raises `ProtocolError` if a part is wrong, or belongs to nothing of these.
    """
    unread = set(parts)
    out: Tensors = {}
    for name, start in allowed.items():
        names = {n for n in _names(codec, name, start, trained) if n in parts}
        if not names:
            continue
        unread -= names
        if name in names:
            out[name] = _part(parts, name, np.float32, start.shape)
        elif codec.name == "zlib":
            bits = _part(parts, name + _BITS, np.int32, start.shape)
            moved = ((bits >> 1) & np.int32(2**31 - 1)) ^ -(bits & 1)
            out[name] = (_integers(start) + moved).view(np.float32).reshape(start.shape)
        else:
            with np.errstate(over="ignore"):  # what is not finite then is refused by the fold
                out[name] = start + _difference(codec, name, parts, start.shape)
    if unread:
        raise ProtocolError(f"update holds something that codec {codec} doesn't have: {shown(min(unread))}")
    return out


def bound(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    """The most bytes that an update of these tensors has in a codec."""
    return packing.HEAD + _inner_bound(codec, shapes, trained)


def _inner_bound(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    rows = [row for name, shape in shapes.items() for row in _largest(codec, name, shape, name in trained)]
    sizes = (math.prod(shape) * (1 if code in ("I8", "U8") else 2 if code == "F16" else 4) for _, code, shape in rows)
    return len(tensorfile.header(rows)) + sum(sizes)


def _largest(codec: Codec, name: str, shape: Shape, coded: bool) -> Iterator[tuple[str, str, Shape]]:
    """Name, type and largest shape of a tensor's parts."""
    size = math.prod(shape)
    if not coded or not size:
        yield name, "F32", shape
    elif codec.name == "zlib":
        yield name + _BITS, "I32", shape
    elif _halved(codec, size):
        yield name + _HALF, "F16", shape
    else:
        kept = codec.name == "top-k"
        yield name + _CODES, "I8", (_count(codec, size),) if kept else shape
        yield name + _SCALES, "F32", (_scales(codec, shape),)
        if kept:
            yield name + _BITMAP, "U8", (packing.bitmap_bytes(size),)


def _names(codec: Codec, name: str, start: Array, trained: Collection[str]) -> set[str]:
    found = {n for n, _, _ in _largest(codec, name, start.shape, name in trained)}
    return found | {name + _GAPS} if name + _BITMAP in found else found


def _halved(codec: Codec, size: int) -> bool:
    return codec.name == "float16" or (codec.name == "top-k" and size < SMALL)


def _count(codec: Codec, size: int) -> int:
    """How many elements of a tensor `top-k` sends."""
    return min(size, math.ceil(codec.share * size))


def _scales(codec: Codec, shape: Shape) -> int:
    rows = shape[0] if codec.name == "int8" and len(shape) > 1 else 1
    return rows if math.prod(shape) >= ROW * rows else 1


def _coded(codec: Codec, name: str, difference: Float32) -> Parts:
    if _halved(codec, difference.size):
        with np.errstate(over="ignore"):
            half = difference.astype(np.float16)
        if not np.isfinite(half).all():
            raise ProtocolError(f"difference of {name} in an update", expected="numbers that float16 can hold")
        return {name + _HALF: half}
    if codec.name == "int8":
        rows = _scales(codec, difference.shape)
        codes, scales = _quantised(difference.reshape(rows, -1))
        return {name + _CODES: codes.reshape(difference.shape), name + _SCALES: scales}
    flat = difference.reshape(-1)
    kept = packing.largest(flat, _count(codec, flat.size))
    codes, scales = _quantised(flat[kept][None])
    gaps, bitmap = packing.to_gaps(kept), packing.to_bitmap(kept, flat.size)
    where = {name + _GAPS: gaps} if gaps.size < bitmap.size else {name + _BITMAP: bitmap}
    return {name + _CODES: codes[0], name + _SCALES: scales, **where}


def _quantised(rows: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Nearest codes, and the scale of each row."""
    scales = (np.abs(rows).max(axis=1) / np.float32(STEPS)).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    # Where a scale is so small that it has lost digits itself, codes could leave their range.
    codes = np.clip(np.rint(rows / divisors), -STEPS, STEPS)
    return np.where(scales[:, None] > 0, codes, 0).astype(np.int8), scales


def _difference(codec: Codec, name: str, parts: Mapping[str, Array], shape: Shape) -> Float32:
    """A tensor's difference as its parts say it. Raises `ProtocolError` if they are missing, of another type or
    shape, or out of range."""
    size = math.prod(shape)
    if _halved(codec, size):
        half = _part(parts, name + _HALF, np.float16, shape)
        if not np.isfinite(half).all():
            raise ProtocolError(f"values of {shown(name + _HALF)} in an update", expected="finite numbers")
        return half.astype(np.float32)
    kept = codec.name == "top-k"
    count = _count(codec, size)
    codes = _part(parts, name + _CODES, np.int8, (count,) if kept else shape)
    if int(codes.min()) < -STEPS:
        raise ProtocolError(f"values of {shown(name + _CODES)} in an update", expected=f"from {-STEPS} to {STEPS}")
    scales = _part(parts, name + _SCALES, np.float32, (_scales(codec, shape),))
    if not np.isfinite(scales).all() or float(scales.min()) < 0:
        raise ProtocolError(f"values of {shown(name + _SCALES)} in an update", expected="finite numbers from 0 up")
    values: Float32 = codes.reshape(scales.size, -1).astype(np.float32) * scales[:, None]
    if not kept:
        return values.reshape(shape)
    out = np.zeros(size, np.float32)
    out[_places(name, parts, count, size)] = values[0]
    return out.reshape(shape)


def _places(name: str, parts: Mapping[str, Array], count: int, size: int) -> npt.NDArray[np.int64]:
    gaps, bitmap = name + _GAPS, name + _BITMAP
    if (gaps in parts) == (bitmap in parts):
        raise ProtocolError(f"indices of {shown(name)} in an update", expected="gaps or a bitmap", got="both or none")
    if bitmap in parts:
        found = _part(parts, bitmap, np.uint8, (packing.bitmap_bytes(size),))
        return packing.from_bitmap(found, count, size, f"{shown(name)} in an update")
    return packing.from_gaps(_part(parts, gaps, np.uint8, None), count, size, f"{shown(name)} in an update")


def _part(parts: Mapping[str, Array], name: str, kind: type[Any], shape: Shape | None) -> Array:
    value = parts.get(name)
    if value is None:
        raise ProtocolError(f"update lacks {shown(name)}")
    if value.dtype != kind or shape not in (None, value.shape):
        wanted = f"{np.dtype(kind)} {'' if shape is None else shape}".strip()
        raise ProtocolError(f"{shown(name)} in an update", expected=wanted, got=f"{value.dtype} {value.shape}")
    return value


def _integers(value: Float32) -> npt.NDArray[np.int32]:
    """The bits of floats, as whole numbers."""
    return np.ascontiguousarray(value, np.float32).reshape(-1).view(np.int32).reshape(value.shape)
