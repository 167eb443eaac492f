"""Arrays of many devices as one tensor each, which stays where it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Tensor = torch.Tensor


_ALIGNED = 64
"""Bytes to which torch aligns what it allocates on a CPU."""


class Row:
    """One device's part of a stack, as an array that is only fetched when somebody reads it.

    Attributes:
        stack: Arrays of all devices [devices, ...].
        place: Which one this is.
    """

    __slots__ = ("place", "stack")

    def __init__(self, stack: Tensor, place: int) -> None:
        self.stack = stack
        self.place = place

    @classmethod
    def of(cls, stack: Tensor) -> list[Row]:
        """All rows of a stack."""
        return [cls(stack, i) for i in range(stack.shape[0])]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self.stack.shape[1:])

    @property
    def ndim(self) -> int:
        """As of an array."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """As of an array."""
        return np.dtype(str(self.stack.dtype).removeprefix("torch."))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        found: Array = self.stack[self.place].cpu().numpy()
        return found if dtype is None else found.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Array:
        found: Array = np.asarray(self)[key]
        return found

    def copy(self) -> Array:
        """An array of its own."""
        return np.array(self)


class Stacks:
    """Puts arrays on a device.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._constants: dict[str, tuple[list[Any], Tensor]] = {}

    def single(self, value: Any) -> Tensor:
        """One array."""
        array = np.asarray(value)
        if array.flags.writeable and not array.ctypes.data % _ALIGNED:
            return torch.from_numpy(array).to(self._device)
        # How products of matrices are summed up depends on where numbers begin in memory, and numpy begins anywhere.
        return torch.tensor(array, device=self._device)

    def stacked(self, name: str, values: Sequence[Any], *, constant: bool = False) -> Tensor:
        """Arrays of equal shapes as one tensor [devices, ...].

        Args:
            name: What they are.
            values: Arrays or rows.
            constant: Whether the same arrays come again and again and nobody writes to them.
        """
        first = values[0]
        if isinstance(first, Row):
            stack = first.stack
            if all(isinstance(v, Row) and v.stack is stack for v in values):
                places = [v.place for v in values]
                if places == list(range(stack.shape[0])):
                    return stack
                return stack.index_select(0, torch.tensor(places, device=stack.device))
        if constant and name in self._constants:
            known, tensor = self._constants[name]
            if len(known) == len(values) and all(a is b for a, b in zip(known, values, strict=True)):
                return tensor
        out = torch.stack([torch.from_numpy(np.require(v, requirements="W")) for v in values]).to(self._device)
        if constant:
            self._constants[name] = (list(values), out)
        return out

    def padded(self, values: Sequence[Array], size: int) -> Tensor:
        """Batches as one tensor [devices, size, ...]; shorter ones repeat their first sample to the end.

        Padding by samples, and not by zeros, keeps everything that is computed of it finite.
        """
        rows = [np.concatenate([v, np.repeat(v[:1], size - len(v), 0)]) if len(v) < size else v for v in values]
        return torch.stack([torch.from_numpy(np.require(r, requirements="W")) for r in rows]).to(self._device)
