"""Relocations: where one submodel's channels are in another, so that a device can reuse the tensors that it keeps.

A server ranks channels again, or gives a device another width. What the device holds (its last weights, and what its
last update left out) then belongs to other channels, in another order. For each tensor `n` whose layout changes, a
relocation has `n::axes`, int32 with one entry per axis: the number of a list of positions, or −1 for an axis that
stays. List number 3 is the int32 tensor `3`: for each index on the new axis the index on the old one, or −1 for a
channel that wasn't there, whose elements become 0. From channels 5, 2, 7 to 2, 9 it is [1, −1]. Arrays of a tensor's
shape that belong to it (`n::momentum`) move with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ProtocolError, value_text
from fedprune.model.selection import Selection
from fedprune.updates import packing

Tensors = dict[str, npt.NDArray[np.float32]]
Lists = Mapping[str, npt.NDArray[Any]]

_AXES_SUFFIX = "::axes"
_NO_POSITION = -1


def make_relocation(before: Selection, now: Selection) -> bytes:
    """The relocation from one selection to another, as the bytes of an envelope."""
    lists: dict[bytes, int] = {}
    axes_by_tensor: dict[str, npt.NDArray[np.int32]] = {}
    for spec in now.architecture.tensors:
        list_numbers = []
        for size, old, new in zip(spec.shape, before.maps(spec.name), now.maps(spec.name), strict=True):
            if np.array_equal(old, new):
                list_numbers.append(_NO_POSITION)
                continue
            inverse = np.full(size, _NO_POSITION, np.int32)
            inverse[old] = np.arange(old.size, dtype=np.int32)
            # Many tensors have the same channels on an axis: equal lists are sent once.
            list_numbers.append(lists.setdefault(inverse[new].tobytes(), len(lists)))
        if any(n != _NO_POSITION for n in list_numbers):
            axes_by_tensor[spec.name + _AXES_SUFFIX] = np.array(list_numbers, np.int32)
    position_lists = {str(k): np.frombuffer(raw, np.int32) for raw, k in lists.items()}
    return packing.pack_tensors({**position_lists, **axes_by_tensor})


def relocate(tensors: Mapping[str, npt.NDArray[np.float32]], raw: bytes, max_bytes: int) -> Tensors:
    """Move tensors into the coordinates of another submodel, by the bytes of `make_relocation`. Raises `ProtocolError`
    if they are damaged, or not for tensors like these. `max_bytes` bounds the unpacked bytes, and those of each tensor:
    a small relocation could ask for a huge one."""
    lists = packing.unpack_tensors(raw, max_bytes)
    return {name: _move_tensor(name, value, lists, max_bytes) for name, value in tensors.items()}


def _move_tensor(name: str, value: npt.NDArray[np.float32], lists: Lists, max_bytes: int) -> npt.NDArray[np.float32]:
    axes = lists.get(name.partition("::")[0] + _AXES_SUFFIX)
    if axes is None:
        return value
    if axes.dtype != np.int32 or axes.shape != (value.ndim,):
        raise ProtocolError(f"axes of {value_text(name)} in a relocation", expected=f"{value.ndim}", got=axes.shape)
    moved_axes = [(axis, int(k)) for axis, k in enumerate(axes) if k != _NO_POSITION]
    positions_by_axis = {axis: _positions(name, k, value.shape[axis], lists) for axis, k in moved_axes}
    shape = [positions_by_axis[axis].size if axis in positions_by_axis else n for axis, n in enumerate(value.shape)]
    # Before anything is allocated: the lists come from the network.
    if 4 * math.prod(shape) > max_bytes:
        raise ProtocolError(
            f"size of {value_text(name)} in a relocation", expected=f"at most {max_bytes} bytes", got=tuple(shape)
        )
    if not value.size:  # an axis without indices has nothing to take
        return np.zeros(shape, np.float32)
    relocated_value = value
    for axis, positions in positions_by_axis.items():
        relocated_value = np.take(relocated_value, np.maximum(positions, 0), axis)
        np.moveaxis(relocated_value, axis, 0)[positions == _NO_POSITION] = 0
    return relocated_value


def _positions(name: str, number: int, size: int, lists: Lists) -> npt.NDArray[np.int32]:
    positions = lists.get(str(number))
    if positions is None or positions.dtype != np.int32 or positions.ndim != 1:
        raise ProtocolError(f"positions of {value_text(name)} in a relocation", expected=f"list {number}", got="none")
    if positions.size and not _NO_POSITION <= int(positions.min()) <= int(positions.max()) < size:
        raise ProtocolError(f"positions of {value_text(name)} in a relocation", expected=f"from -1 to {size - 1}")
    return positions
