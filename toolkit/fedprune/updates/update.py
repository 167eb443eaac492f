"""Updates in fewer bytes: each trained tensor as its difference to the weights that were sent, in a codec.

Tensors that weren't trained (batch-norm statistics), and squared gradients, travel as they are; with `int4`, statistics
have 12 significant bits. Inside the envelope (`fedprune.updates.packing`) is a tensor file with, for a trained tensor
`n`:

| part | type | codec | |
|---|---|---|---|
| `n::half` | F16, as `n` | whole weights; `top-k` for small tensors | the difference |
| `n::codes`, `n::scales` | I8, as `n`; F32 | `int8` | difference = code · scale, with a scale per row or for all |
| `n::codes`, `n::scales` | U8; F32 | `int4` | the same, with two codes per byte |
| `n::codes`, `n::scales`, `n::gaps` or `n::bitmap` | I8, `[k]`; F32, `[1]`; U8 | `top-k` | the same for k elements |

Encoding also returns what the codec leaves out, to be added to the next difference (error feedback: Seide et al. 2014;
Stich et al. 2018, "Sparsified SGD with memory"). `n::squares` holds absolute values, not differences, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError, shown
from fedprune.model import step_contract
from fedprune.updates import packing
from fedprune.updates.codecs import WHOLE, Codec

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
Parts = dict[str, Array]
Shape = tuple[int, ...]
Form = dict[str, tuple[str, Shape | None]]

# Elements of a row from which it has a scale of its own: four bytes for fewer elements would be too large a share.
ROW = 64

# Elements below which `top-k` sends a tensor whole, because there is little to gain.
SMALL = 256

HALF, _CODES, _SCALES, _GAPS, _BITMAP = "::half", "::codes", "::scales", "::gaps", "::bitmap"
_TYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
# The codec with two codes per byte: the last bits of other numbers would be a sizeable share of its file.
_SHORT = "int4"


def encode(
    codec: Codec,
    tensors: Mapping[str, Float32],
    sent: Mapping[str, Float32],
    trained: Collection[str],
    residual: Mapping[str, Float32] | None = None,
) -> tuple[bytes, Tensors]:
    """Encode an update; returns its bytes, and by tensor what they leave out.

    Raises `ProtocolError` if a difference can't be coded: it is not finite or too large for the codec.

    Args:
        sent: The weights that training started from, as they were sent.
        trained: Names of the tensors that are coded as differences.
        residual: By tensor what earlier updates left out.
    """
    encoded: Parts = {}
    left_out: Tensors = {}
    for name, value in tensors.items():
        if name not in trained or not value.size:
            encoded[name] = _cut(value, 12) if codec.name == _SHORT and name in sent else value
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            difference = value - sent[name]
            if residual is not None and name in residual:
                difference += residual[name]
        if not np.isfinite(difference).all():
            raise ProtocolError(f"difference of {name} in an update", expected="finite numbers")
        tensor_parts = _coded(codec, name, difference)
        form = _form(codec, name, value.shape, trained)
        # By the receiver's own decoding, so that both sides agree to the bit on what has arrived.
        left_out[name] = difference - _difference(codec, name, form, tensor_parts, value.shape)
        encoded |= tensor_parts
    return packing.pack(encoded), left_out


def decode(codec: Codec, raw: bytes, sent: Mapping[str, Float32], trained: Collection[str]) -> Tensors:
    """Decode the tensors of an update; `sent` and `trained` are as for `encode`.

    Whether all tensors are there, and their values, is checked by the fold. Raises `ProtocolError` if the update is
    damaged, larger than these tensors can be, or holds something else.
    """
    squares = {step_contract.squares(n): sent[n] for n in sent if n in trained}
    allowed = {**sent, **squares}
    stored = packing.unpack(raw, _inner_bound(codec, {n: v.shape for n, v in allowed.items()}, trained))
    return read(codec, stored, allowed, trained)


def read(
    codec: Codec, encoded_parts: Mapping[str, Array], allowed: Mapping[str, Float32], trained: Collection[str]
) -> Tensors:
    """Decode tensors from the parts in an envelope.

    Trained tensors are coded as the difference to those in `allowed`; of the others only the shape is used. Some may be
    missing. Raises `ProtocolError` if a part is wrong, or belongs to no tensor of `allowed`.
    """
    unread = set(encoded_parts)
    tensors: Tensors = {}
    for name, reference in allowed.items():
        form = _form(codec, name, reference.shape, trained)
        names = form.keys() & encoded_parts.keys()
        if not names:
            continue
        unread -= names
        if name in names:
            tensors[name] = _part(encoded_parts, form, name)
        else:
            with np.errstate(over="ignore"):  # what is not finite then is refused by the fold
                tensors[name] = reference + _difference(codec, name, form, encoded_parts, reference.shape)
    if unread:
        raise ProtocolError(f"update holds something that codec {codec} doesn't have: {shown(min(unread))}")
    return tensors


def bound(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    """The maximum number of bytes of an update of these tensors in a codec."""
    return packing.HEAD + _inner_bound(codec, shapes, trained)


def _inner_bound(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    rows = [
        (part_name, code, part_shape)
        for name, shape in shapes.items()
        for part_name, (code, part_shape) in _form(codec, name, shape, trained).items()
        if part_shape is not None
    ]
    return len(tensorfile.header(rows)) + sum(math.prod(s) * np.dtype(_TYPES[code]).itemsize for _, code, s in rows)


def _form(codec: Codec, name: str, shape: Shape, trained: Collection[str]) -> Form:
    """The parts of a tensor by name: type, and shape. Gaps have None: their length varies, but is below a bitmap's."""
    size = math.prod(shape)
    if name not in trained or not size:
        return {name: ("F32", shape)}
    if _halved(codec, size):
        return {name + HALF: ("F16", shape)}
    scales: Form = {name + _SCALES: ("F32", (_rows(codec, shape),))}
    if codec.name == "top-k":
        positions: Form = {name + _BITMAP: ("U8", (packing.bitmap_bytes(size),)), name + _GAPS: ("U8", None)}
        return {name + _CODES: ("I8", (_count(codec, size),)), **scales, **positions}
    codes = ("U8", (-(-size // 2),)) if codec.name == _SHORT else ("I8", shape)
    return {name + _CODES: codes, **scales}


def _halved(codec: Codec, size: int) -> bool:
    return codec == WHOLE or (codec.name == "top-k" and size < SMALL)


def _count(codec: Codec, size: int) -> int:
    """How many elements of a tensor `top-k` sends."""
    return min(size, math.ceil(codec.share * size))


def _rows(codec: Codec, shape: Shape) -> int:
    """How many rows of a tensor have scales of their own."""
    rows = shape[0] if codec.name != "top-k" and len(shape) > 1 else 1
    return rows if math.prod(shape) >= ROW * rows else 1


def _coded(codec: Codec, name: str, difference: Float32) -> Parts:
    if _halved(codec, difference.size):
        with np.errstate(over="ignore"):
            half = difference.astype(np.float16)
        if not np.isfinite(half).all():
            raise ProtocolError(f"difference of {name} in an update", expected="numbers that float16 can hold")
        return {name + HALF: half}
    flat = difference.reshape(-1)
    positions: Parts = {}
    if codec.name == "top-k":
        indices = packing.largest(flat, _count(codec, flat.size))
        gaps, bitmap = packing.to_gaps(indices), packing.to_bitmap(indices, flat.size)
        positions = {name + _GAPS: gaps} if gaps.size < bitmap.size else {name + _BITMAP: bitmap}
        flat = flat[indices]
    codes, scales = _quantised(flat.reshape(_rows(codec, difference.shape), -1), codec)
    if codec.name == _SHORT:
        codes = packing.to_pairs(codes, codec.steps)
    elif not positions:
        codes = codes.reshape(difference.shape)
    return {name + _CODES: codes, name + _SCALES: scales, **positions}


def _quantised(rows: Float32, codec: Codec) -> tuple[Array, Float32]:
    """Nearest codes, and the scale of each row."""
    steps = codec.steps
    scales = (np.abs(rows).max(axis=1) / np.float32(steps)).astype(np.float32)
    if codec.name == _SHORT:
        scales = _cut(scales, 8)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    # A scale that was shortened to fewer bits is too small, so that codes could leave their range.
    codes = np.clip(np.rint(rows / divisors), -steps, steps)
    return np.where(scales[:, None] > 0, codes, 0).astype(np.int8).reshape(-1), scales


def _cut(values: Float32, bits: int) -> Float32:
    """Numbers with only their first significant bits: the others are 0, which zlib compresses to nearly nothing."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.int32)
    shortened: Float32 = (flat & np.int32(-(1 << (24 - bits)))).view(np.float32).reshape(values.shape)
    return shortened


def _difference(codec: Codec, name: str, form: Form, encoded_parts: Mapping[str, Array], shape: Shape) -> Float32:
    """Decode a tensor's difference from its parts. Raises `ProtocolError` if they are missing, of another type or
    shape, or out of range."""
    size = math.prod(shape)
    if _halved(codec, size):
        half = _part(encoded_parts, form, name + HALF)
        if not np.isfinite(half).all():
            raise ProtocolError(f"values of {shown(name + HALF)} in an update", expected="finite numbers")
        return half.astype(np.float32)
    steps = codec.steps
    codes = _part(encoded_parts, form, name + _CODES)
    if codes.dtype == np.uint8:
        codes = packing.from_pairs(codes, steps, size, f"{shown(name)} in an update")
    elif int(codes.min()) < -steps:
        raise ProtocolError(f"values of {shown(name + _CODES)} in an update", expected=f"from {-steps} to {steps}")
    scales = _part(encoded_parts, form, name + _SCALES)
    if not np.isfinite(scales).all() or float(scales.min()) < 0:
        raise ProtocolError(f"values of {shown(name + _SCALES)} in an update", expected="finite numbers from 0 up")
    values: Float32 = codes.reshape(scales.size, -1).astype(np.float32) * scales[:, None]
    if codec.name != "top-k":
        return values.reshape(shape)
    scattered = np.zeros(size, np.float32)
    scattered[_places(name, form, encoded_parts, codes.size, size)] = values[0]
    return scattered.reshape(shape)


def _places(name: str, form: Form, encoded_parts: Mapping[str, Array], count: int, size: int) -> npt.NDArray[np.int64]:
    gaps, bitmap = name + _GAPS, name + _BITMAP
    if (gaps in encoded_parts) == (bitmap in encoded_parts):
        raise ProtocolError(f"indices of {shown(name)} in an update", expected="gaps or a bitmap", got="both or none")
    if bitmap in encoded_parts:
        return packing.from_bitmap(_part(encoded_parts, form, bitmap), count, size, f"{shown(name)} in an update")
    return packing.from_gaps(_part(encoded_parts, form, gaps), count, size, f"{shown(name)} in an update")


def _part(encoded_parts: Mapping[str, Array], form: Form, name: str) -> Array:
    value = encoded_parts.get(name)
    if value is None:
        raise ProtocolError(f"update lacks {shown(name)}")
    code, shape = form[name]
    if value.dtype != _TYPES[code] or shape not in (None, value.shape):
        expected = f"{np.dtype(_TYPES[code])} {'' if shape is None else shape}".strip()
        raise ProtocolError(f"{shown(name)} in an update", expected=expected, got=f"{value.dtype} {value.shape}")
    return value
