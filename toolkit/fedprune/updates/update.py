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
from fedprune.core.errors import ProtocolError, value_text
from fedprune.model import step_contract
from fedprune.updates import packing
from fedprune.updates.codecs import HALF_CODEC, Codec

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
EncodedParts = dict[str, Array]
Shape = tuple[int, ...]
PartSpecs = dict[str, tuple[str, Shape | None]]

# Elements of a row from which it has a scale of its own: four bytes for fewer elements would be too large a share.
MIN_SCALED_ROW = 64

# Elements below which `top-k` sends a tensor whole, because there is little to gain.
MIN_SPARSE_TENSOR = 256

HALF_SUFFIX, _CODES_SUFFIX, _SCALES_SUFFIX, _GAPS_SUFFIX, _BITMAP_SUFFIX = (
    "::half",
    "::codes",
    "::scales",
    "::gaps",
    "::bitmap",
)
_TYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
# The codec with two codes per byte. It also shortens other numbers, which would be a large part of its file.
_PAIRED_CODEC = "int4"


def encode(
    codec: Codec,
    tensors: Mapping[str, Float32],
    sent: Mapping[str, Float32],
    trained: Collection[str],
    residual: Mapping[str, Float32] | None = None,
) -> tuple[bytes, Tensors]:
    """Encode an update; returns its bytes, and by tensor the rounding errors (error feedback).

    `sent` are the weights that training started from, `trained` the names of the tensors that are coded as differences,
    `residual` the errors of earlier updates. Raises `ProtocolError` if a difference can't be coded: it is not finite or
    too large for the codec.
    """
    encoded: EncodedParts = {}
    left_out: Tensors = {}
    for name, value in tensors.items():
        if name not in trained or not value.size:
            encoded[name] = _shorten(value, 12) if codec.name == _PAIRED_CODEC and name in sent else value
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            difference = value - sent[name]
            if residual is not None and name in residual:
                difference += residual[name]
        if not np.isfinite(difference).all():
            raise ProtocolError(f"difference of {name} in an update", expected="finite numbers")
        tensor_parts = _encode_difference(codec, name, difference)
        form = _part_specs(codec, name, value.shape, trained)
        # By the receiver's own decoding, so that both sides agree to the bit on what has arrived.
        left_out[name] = difference - _decode_difference(codec, name, form, tensor_parts, value.shape)
        encoded |= tensor_parts
    return packing.pack_tensors(encoded), left_out


def decode(codec: Codec, raw: bytes, sent: Mapping[str, Float32], trained: Collection[str]) -> Tensors:
    """Decode the tensors of an update; `sent` and `trained` are as for `encode`. Whether all tensors are there, and
    their values, is checked by the fold. Raises `ProtocolError` if the update is damaged, larger than these tensors can
    be, or holds something else."""
    squares = {step_contract.squares_name(n): sent[n] for n in sent if n in trained}
    allowed = {**sent, **squares}
    stored = packing.unpack_tensors(raw, _max_inner_bytes(codec, {n: v.shape for n, v in allowed.items()}, trained))
    return decode_parts(codec, stored, allowed, trained)


def decode_parts(
    codec: Codec, encoded_parts: Mapping[str, Array], allowed: Mapping[str, Float32], trained: Collection[str]
) -> Tensors:
    """Decode tensors from the parts in an envelope. Trained tensors are coded as the difference to those in `allowed`;
    of the others only the shape is used. Some may be missing. Raises `ProtocolError` if a part is wrong, or belongs to
    no tensor of `allowed`."""
    unread = set(encoded_parts)
    tensors: Tensors = {}
    for name, reference in allowed.items():
        form = _part_specs(codec, name, reference.shape, trained)
        names = form.keys() & encoded_parts.keys()
        if not names:
            continue
        unread -= names
        if name in names:
            tensors[name] = _checked_part(encoded_parts, form, name)
        else:
            with np.errstate(over="ignore"):  # what is not finite then is refused by the fold
                tensors[name] = reference + _decode_difference(codec, name, form, encoded_parts, reference.shape)
    if unread:
        raise ProtocolError(f"update holds something that codec {codec} doesn't have: {value_text(min(unread))}")
    return tensors


def max_update_bytes(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    """The maximum number of bytes of an update of these tensors in a codec."""
    return packing.ENVELOPE_HEADER_BYTES + _max_inner_bytes(codec, shapes, trained)


def _max_inner_bytes(codec: Codec, shapes: Mapping[str, Shape], trained: Collection[str]) -> int:
    rows = [
        (part_name, code, part_shape)
        for name, shape in shapes.items()
        for part_name, (code, part_shape) in _part_specs(codec, name, shape, trained).items()
        if part_shape is not None
    ]
    return len(tensorfile.header_for_specs(rows)) + sum(
        math.prod(s) * np.dtype(_TYPES[code]).itemsize for _, code, s in rows
    )


def _part_specs(codec: Codec, name: str, shape: Shape, trained: Collection[str]) -> PartSpecs:
    """The parts of a tensor by name: type, and shape. Gaps have None: their length varies, but is below a bitmap's."""
    size = math.prod(shape)
    if name not in trained or not size:
        return {name: ("F32", shape)}
    if _is_half(codec, size):
        return {name + HALF_SUFFIX: ("F16", shape)}
    scales: PartSpecs = {name + _SCALES_SUFFIX: ("F32", (_scaled_rows(codec, shape),))}
    if codec.name == "top-k":
        positions: PartSpecs = {
            name + _BITMAP_SUFFIX: ("U8", (packing.bitmap_bytes(size),)),
            name + _GAPS_SUFFIX: ("U8", None),
        }
        return {name + _CODES_SUFFIX: ("I8", (_sparse_count(codec, size),)), **scales, **positions}
    codes = ("U8", (-(-size // 2),)) if codec.name == _PAIRED_CODEC else ("I8", shape)
    return {name + _CODES_SUFFIX: codes, **scales}


def _is_half(codec: Codec, size: int) -> bool:
    return codec == HALF_CODEC or (codec.name == "top-k" and size < MIN_SPARSE_TENSOR)


def _sparse_count(codec: Codec, size: int) -> int:
    """How many elements of a tensor `top-k` sends."""
    return min(size, math.ceil(codec.share * size))


def _scaled_rows(codec: Codec, shape: Shape) -> int:
    """How many rows of a tensor have scales of their own."""
    rows = shape[0] if codec.name != "top-k" and len(shape) > 1 else 1
    return rows if math.prod(shape) >= MIN_SCALED_ROW * rows else 1


def _encode_difference(codec: Codec, name: str, difference: Float32) -> EncodedParts:
    if _is_half(codec, difference.size):
        with np.errstate(over="ignore"):
            half = difference.astype(np.float16)
        if not np.isfinite(half).all():
            raise ProtocolError(f"difference of {name} in an update", expected="numbers that float16 can hold")
        return {name + HALF_SUFFIX: half}
    flat = difference.reshape(-1)
    positions: EncodedParts = {}
    if codec.name == "top-k":
        indices = packing.largest_indices(flat, _sparse_count(codec, flat.size))
        gaps, bitmap = packing.to_gaps(indices), packing.to_bitmap(indices, flat.size)
        positions = {name + _GAPS_SUFFIX: gaps} if gaps.size < bitmap.size else {name + _BITMAP_SUFFIX: bitmap}
        flat = flat[indices]
    codes, scales = _quantise_rows(flat.reshape(_scaled_rows(codec, difference.shape), -1), codec)
    if codec.name == _PAIRED_CODEC:
        codes = packing.to_pairs(codes, codec.steps)
    elif not positions:
        codes = codes.reshape(difference.shape)
    return {name + _CODES_SUFFIX: codes, name + _SCALES_SUFFIX: scales, **positions}


def _quantise_rows(rows: Float32, codec: Codec) -> tuple[Array, Float32]:
    """Nearest codes, and the scale of each row."""
    steps = codec.steps
    scales = (np.abs(rows).max(axis=1) / np.float32(steps)).astype(np.float32)
    if codec.name == _PAIRED_CODEC:
        scales = _shorten(scales, 8)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, None]
    # A scale that was shortened to fewer bits is too small, so that codes could leave their range.
    codes = np.clip(np.rint(rows / divisors), -steps, steps)
    return np.where(scales[:, None] > 0, codes, 0).astype(np.int8).reshape(-1), scales


def _shorten(values: Float32, bits: int) -> Float32:
    """Numbers with only their first significant bits: the others are 0, which zlib compresses to nearly nothing."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.int32)
    shortened: Float32 = (flat & np.int32(-(1 << (24 - bits)))).view(np.float32).reshape(values.shape)
    return shortened


def _decode_difference(
    codec: Codec, name: str, form: PartSpecs, encoded_parts: Mapping[str, Array], shape: Shape
) -> Float32:
    """Decode a tensor's difference from its parts. Raises `ProtocolError` if they are missing, of another type or
    shape, or out of range."""
    size = math.prod(shape)
    if _is_half(codec, size):
        half = _checked_part(encoded_parts, form, name + HALF_SUFFIX)
        if not np.isfinite(half).all():
            raise ProtocolError(f"values of {value_text(name + HALF_SUFFIX)} in an update", expected="finite numbers")
        return half.astype(np.float32)
    steps = codec.steps
    codes = _checked_part(encoded_parts, form, name + _CODES_SUFFIX)
    if codes.dtype == np.uint8:
        codes = packing.from_pairs(codes, steps, size, f"{value_text(name)} in an update")
    elif int(codes.min()) < -steps:
        raise ProtocolError(
            f"values of {value_text(name + _CODES_SUFFIX)} in an update", expected=f"from {-steps} to {steps}"
        )
    scales = _checked_part(encoded_parts, form, name + _SCALES_SUFFIX)
    if not np.isfinite(scales).all() or float(scales.min()) < 0:
        raise ProtocolError(
            f"values of {value_text(name + _SCALES_SUFFIX)} in an update", expected="finite numbers from 0 up"
        )
    values: Float32 = codes.reshape(scales.size, -1).astype(np.float32) * scales[:, None]
    if codec.name != "top-k":
        return values.reshape(shape)
    scattered = np.zeros(size, np.float32)
    scattered[_sparse_indices(name, form, encoded_parts, codes.size, size)] = values[0]
    return scattered.reshape(shape)


def _sparse_indices(
    name: str, form: PartSpecs, encoded_parts: Mapping[str, Array], count: int, size: int
) -> npt.NDArray[np.int64]:
    gaps, bitmap = name + _GAPS_SUFFIX, name + _BITMAP_SUFFIX
    if (gaps in encoded_parts) == (bitmap in encoded_parts):
        raise ProtocolError(
            f"indices of {value_text(name)} in an update", expected="gaps or a bitmap", got="both or none"
        )
    if bitmap in encoded_parts:
        return packing.from_bitmap(
            _checked_part(encoded_parts, form, bitmap), count, size, f"{value_text(name)} in an update"
        )
    return packing.from_gaps(_checked_part(encoded_parts, form, gaps), count, size, f"{value_text(name)} in an update")


def _checked_part(encoded_parts: Mapping[str, Array], form: PartSpecs, name: str) -> Array:
    value = encoded_parts.get(name)
    if value is None:
        raise ProtocolError(f"update lacks {value_text(name)}")
    code, shape = form[name]
    if value.dtype != _TYPES[code] or shape not in (None, value.shape):
        expected = f"{np.dtype(_TYPES[code])} {'' if shape is None else shape}".strip()
        raise ProtocolError(f"{value_text(name)} in an update", expected=expected, got=f"{value.dtype} {value.shape}")
    return value
