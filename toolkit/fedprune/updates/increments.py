"""Masked submodels as increments, which boards with nested masks share (PR-FL's residual split).

Increment i has the values of the elements that mask i has and mask i − 1 lacks, so a board puts the increments up to
its own together. Files are packed tensors. For a masked tensor an increment has its new values in C order, and a bit
for each element that the mask before lacks, 0 behind the last one; the increment that completes the model has the
tensor's shape in place of the bits. Tensors without a mask are in the first increment.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core import tensorfile
from fedprune.core.errors import ProtocolError
from fedprune.model.selection import ElementMask
from fedprune.updates import packing

_BITS, _SHAPE = "::bits", "::shape"

Flags = npt.NDArray[np.bool_]


def encode(tensors: Mapping[str, npt.NDArray[np.float32]], smaller: ElementMask | None, mask: ElementMask) -> bytes:
    """The increment from a smaller mask, None for the first one, to `mask`, which is empty for the whole model. Tensors
    are full, in the order of the weights' file."""
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, value in tensors.items():
        if name not in (mask or smaller or {}):
            if smaller is None:
                parts[name] = value
            continue
        before = _padded_flags(np.zeros(value.shape, np.bool_) if smaller is None else smaller[name])
        after = _padded_flags(mask[name] if mask else np.ones(value.shape, np.bool_))
        parts[name] = value.reshape(-1)[(after & ~before)[: value.size]]
        if mask:
            parts[name + _BITS] = np.packbits(after[~before])
        else:
            parts[name + _SHAPE] = np.array(value.shape, np.int64)
    # Random bits don't repeat themselves: without a search for repetitions files are smaller, and made 8 times as fast.
    return packing.pack_tensors(parts, zlib.Z_HUFFMAN_ONLY)


def decode(increments: Iterable[bytes], max_bytes: int, max_elements: int) -> tuple[bytes, bytes]:
    """The files of weights and mask that increments make; the second is empty if they make a whole model. Raises
    `ProtocolError` if they are damaged, don't fit each other, unpack to more than `max_bytes` in all, or have masked
    tensors of more than `max_elements` in all."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    masks: dict[str, Flags] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for increment in increments:
        parts = packing.unpack_tensors(increment, max_bytes)
        max_bytes -= sum(value.nbytes for value in parts.values())
        for name, values in parts.items():
            bits, shape = parts.get(name + _BITS), parts.get(name + _SHAPE)
            if name.endswith((_BITS, _SHAPE)):
                continue
            if bits is None and shape is None:
                tensors[name] = values
                continue
            if name not in masks:
                size = 8 * (0 if bits is None else bits.size)
                max_elements -= size
                if max_elements < 0:
                    raise ProtocolError("elements of a model in increments", expected="no more than are offered")
                tensors[name], masks[name] = np.zeros(size, np.float32), np.zeros(size, np.bool_)
            new = _new_elements(name, masks[name], bits, shape)
            if values.dtype != np.float32 or values.shape != new.shape or not np.isfinite(values).all():
                raise ProtocolError(f"increment of {name}", expected=f"{new.size} finite numbers", got=values.shape)
            tensors[name][new], masks[name][new] = values, True
            if shape is not None:
                shapes[name] = tuple(int(n) for n in shape)
    whole = shapes.keys() == masks.keys()
    packed = {n: v[masks[n]].reshape(shapes[n] if whole else -1) if n in masks else v for n, v in tensors.items()}
    mask_file = b"" if whole else tensorfile.encode({n: np.packbits(masks[n]) for n in sorted(masks)})
    return tensorfile.encode(packed), mask_file


def _padded_flags(mask: Flags) -> Flags:
    """The flags of a mask as its bits' file has them, which knows only how many bytes they take."""
    return np.unpackbits(np.packbits(mask.reshape(-1))).astype(np.bool_)


def _new_elements(
    name: str, active: Flags, bits: npt.NDArray[Any] | None, shape: npt.NDArray[Any] | None
) -> npt.NDArray[np.int64]:
    """Where an increment's values belong. Raises `ProtocolError` if its bits or shape don't fit what was before."""
    missing: npt.NDArray[np.int64] = np.flatnonzero(~active)
    if bits is not None and bits.dtype == np.uint8:
        return missing[packing.from_bitmap(bits, int(np.unpackbits(bits).sum()), missing.size, name)]
    is_shape = shape is not None and shape.dtype == np.int64 and shape.ndim == 1 and min(shape, default=0) >= 0
    size = math.prod(shape.tolist()) if shape is not None and is_shape else -1
    if not 0 <= active.size - size < 8 or (shape is not None and shape.size > 32) or active[size:].any():
        raise ProtocolError(f"shape of {name} in an increment", expected=f"{active.size} elements", got=size)
    return missing[missing < size]
