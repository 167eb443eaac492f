"""Element masks: which single weights of a submodel are active, packed to a bit each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.errors import BundleError
from fedprune.selection import Tensors


@dataclass(frozen=True, eq=False)
class ElementMask:
    """Active elements of some tensors; tensors that it doesn't name are active as a whole.

    Attributes:
        active: Per masked tensor a boolean array of its shape.
    """

    active: dict[str, npt.NDArray[np.bool_]]

    def pack(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Tensors with masked ones reduced to their active values [n_active], in C order."""
        return {n: v[self.active[n]] if n in self.active else v for n, v in tensors.items()}

    def unpack(self, packed: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """What `pack` was given, with 0 where masked.

        Raises:
            BundleError: A tensor has another number of values than the mask has active elements.
        """
        out: Tensors = {}
        for name, value in packed.items():
            mask = self.active.get(name)
            if mask is None:
                out[name] = value
                continue
            if value.shape != (int(mask.sum()),):
                raise BundleError(f"active values of {name}", expected=int(mask.sum()), got=value.shape)
            out[name] = np.zeros(mask.shape, np.float32)
            out[name][mask] = value
        return out

    def to_tensors(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Packed bits [ceil(n / 8)] by tensor name, for a tensor file."""
        return {n: np.packbits(m.reshape(-1)) for n, m in self.active.items()}

    @classmethod
    def from_tensors(
        cls, packed: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]
    ) -> ElementMask:
        """Read what `to_tensors` wrote.

        Args:
            packed: The bits.
            shapes: Shapes of the submodel's tensors.

        Raises:
            BundleError: A tensor is unknown, or its bits are of another number or type.
        """
        active = {}
        for name, bits in packed.items():
            shape = shapes.get(name)
            count = int(np.prod(shape)) if shape is not None else 0
            if shape is None or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
                raise BundleError(
                    f"mask of {name}",
                    expected="no mask" if shape is None else f"{-(-count // 8)} bytes",
                    got=f"{bits.dtype} {bits.shape}",
                )
            active[name] = np.unpackbits(bits, count=count).astype(np.bool_).reshape(shape)
        return cls(active)
