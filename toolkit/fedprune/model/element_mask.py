"""Element masks as files: a bit for each element, and only the active values of masked tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.selection import ElementMask, Selection, Tensors, mesh


def gather_mask(mask: ElementMask, selection: Selection) -> ElementMask:
    """The mask of a submodel, gathered from that of the whole model."""
    return {name: bits[mesh(selection.maps(name))] for name, bits in mask.items()}


def pack_active(mask: ElementMask, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """Tensors with masked ones reduced to their active values [n_active], in C order."""
    return {n: v[mask[n]] if n in mask else v for n, v in tensors.items()}


def unpack_active(mask: ElementMask, packed: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """The inverse of `pack_active`, with 0 where masked. Raises `BundleError` if a masked tensor has another number of
    values than the mask has active elements, or another type."""
    tensors: Tensors = dict(packed)
    for name in mask.keys() & packed.keys():
        value, active = packed[name], mask[name]
        if value.shape != (int(active.sum()),):
            raise BundleError(f"active values of {name}", expected=int(active.sum()), got=value.shape)
        if value.dtype != np.float32:  # assigning would convert it silently
            raise BundleError(f"type of {name}", expected="float32", got=value.dtype)
        tensors[name] = np.zeros(active.shape, np.float32)
        tensors[name][active] = value
    return tensors


def mask_to_bits(mask: ElementMask) -> dict[str, npt.NDArray[np.uint8]]:
    """Packed bits [ceil(n / 8)] by tensor name, for a tensor file."""
    return {n: np.packbits(m.reshape(-1)) for n, m in mask.items()}


def mask_from_bits(packed: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> ElementMask:
    """Read the bits that `mask_to_bits` wrote for tensors of these shapes. Raises `BundleError` if a tensor is
    unknown, or its bits are of another number or type, or not 0 behind the last one."""
    mask = {}
    for name, bits in packed.items():
        shape = shapes.get(name)
        count = int(np.prod(shape)) if shape is not None else 0
        if shape is None or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
            raise BundleError(
                f"mask of {name}",
                expected="no mask" if shape is None else f"{-(-count // 8)} bytes",
                got=f"{bits.dtype} {bits.shape}",
            )
        flags = np.unpackbits(bits).astype(np.bool_)
        # Spare bits have to be 0, so that a mask has one form only: its file is known by its digest.
        if flags[count:].any():
            raise BundleError(f"mask of {name}", expected=f"0 behind its {count} bits")
        mask[name] = flags[:count].reshape(shape)
    return mask


def apply_mask(mask: ElementMask, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """Tensors with 0 where masked; those that the mask doesn't name are the same arrays."""
    zero = np.float32(0)
    return {n: np.where(mask[n], v, zero) if n in mask else v for n, v in tensors.items()}
