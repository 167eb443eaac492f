"""Numbers of quantised tensors: which integers there are, and which real numbers they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Node, node_label

FLOAT_MODEL_HINT = (
    "Export the float32 model that it was made from; --precision int8 (precisions) makes a board predict with 8 bits."
)

_INTEGER_NAME = re.compile(r"(u?)int(\d+)")


def refuse(node: Node, reason: str) -> ModelError:
    """The error for a node of a quantised file that has no float form here."""
    return ModelError(f"the file is quantised, and {node_label(node)} {reason}", hint=FLOAT_MODEL_HINT)


@dataclass(frozen=True)
class Quantisation:
    """How integers stand for real numbers: (integer - zero point) · scale.

    Attributes:
        scale: The name of the scale: one number, or one for each channel or block.
        zero: The name of the zero point; empty for 0.
        axis: The axis of channels or blocks, if the scale has several numbers.
        block: How many numbers along the axis share a scale; 0 if each channel has its own.
    """

    scale: str
    zero: str = ""
    axis: int = 1
    block: int = 0


def integer_range(dtype: np.dtype[np.generic]) -> tuple[int, int]:
    """The least and greatest integer of a type of up to 32 bits. Raises `ModelError` for another type."""
    match = _INTEGER_NAME.fullmatch(dtype.name)
    if match is None or int(match[2]) > 32:
        raise ModelError("the file is quantised to another type than integers", got=dtype.name, hint=FLOAT_MODEL_HINT)
    bits = int(match[2])
    return (0, 2**bits - 1) if match[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def dequantised(values: Array, scale: Array, zero: Array | None, axis: int, block: int = 0) -> Array:
    """The real numbers of integers, in the type of the scale. Raises `ModelError` if the scale doesn't fit them."""
    integer_range(values.dtype)
    spread_scale = _spread(scale, values.shape, axis, block).astype(np.float64)
    numbers = values.astype(np.float64)
    if zero is not None:
        numbers = numbers - _spread(zero, values.shape, axis, block).astype(np.float64)
    return np.asarray(numbers * spread_scale, scale.dtype if scale.dtype.kind == "f" else np.float32)


def _spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """A scale or zero point in a shape that is broadcast over a tensor."""
    if parameter.size == 1:
        return parameter.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise ModelError("axis of a scale", expected=f"one of {len(shape)} axes", got=axis)
    axis %= len(shape)
    if block:
        whole = np.repeat(parameter, block, axis) if parameter.ndim == len(shape) else parameter
        cut = whole[(slice(None),) * axis + (slice(shape[axis]),)] if whole.ndim == len(shape) else whole
        if cut.shape != shape:
            raise ModelError("scales of blocks", expected=f"one for {block} of {shape}", got=parameter.shape)
        return cut
    if parameter.size != shape[axis]:
        raise ModelError("scales of channels", expected=f"{shape[axis]}", got=parameter.shape)
    return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])


def unpack_blocks(packed: Array, bits: int, columns: int) -> Array:
    """The unsigned integers of bytes that hold several, the lowest bits first: [rows, bytes] → [rows, columns]."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    numbers = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return np.asarray(numbers.reshape(packed.shape[0], -1)[:, :columns], np.uint8)
