"""Element masks: which single weights of a submodel are active, packed to a bit each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.selection import Selection, Tensors, mesh

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ElementMask:
    """Active elements of some tensors, per masked tensor a boolean array of its shape; tensors that it doesn't name are
    active as a whole."""

    active: dict[str, Bits]

    @property
    def count(self) -> int:
        """Active elements of the tensors that the mask names."""
        return sum(int(np.count_nonzero(m)) for m in self.active.values())

    @property
    def size(self) -> int:
        return sum(m.size for m in self.active.values())

    @property
    def density(self) -> float:
        """Their active share; 1 where the mask names none."""
        return self.count / self.size if self.size else 1.0

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make sure that the mask is one of tensors of these shapes. Raises `BundleError` if it names another tensor,
        or has another shape."""
        for name, mask in self.active.items():
            if shapes.get(name) != mask.shape:
                raise BundleError(f"mask of {name}", expected=shapes.get(name, "no such tensor"), got=mask.shape)

    def applied(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Tensors with 0 where masked; those that the mask doesn't name are the same arrays."""
        zero = np.float32(0)
        return {n: np.where(self.active[n], v, zero) if n in self.active else v for n, v in tensors.items()}

    def gathered(self, selection: Selection) -> ElementMask:
        """The mask of a submodel, out of the whole model's."""
        return ElementMask({n: m[mesh(selection.maps(n))] for n, m in self.active.items()})

    def intersection(self, other: ElementMask) -> ElementMask:
        """The elements that are active in both masks: tensors that one of them names."""
        out = dict(self.active)
        for name, mask in other.active.items():
            out[name] = out[name] & mask if name in out else mask
        return ElementMask(out)

    def pack(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Tensors with masked ones reduced to their active values [n_active], in C order."""
        return {n: v[self.active[n]] if n in self.active else v for n, v in tensors.items()}

    def unpack(self, packed: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """The input of `pack`, with 0 where masked. Raises `BundleError` if a masked tensor has another number of
        values than the mask has active elements, or another type."""
        out: Tensors = {}
        for name, value in packed.items():
            mask = self.active.get(name)
            if mask is None:
                out[name] = value
                continue
            if value.shape != (int(mask.sum()),):
                raise BundleError(f"active values of {name}", expected=int(mask.sum()), got=value.shape)
            if value.dtype != np.float32:
                raise BundleError(f"type of {name}", expected="float32", got=value.dtype)
            out[name] = np.zeros(mask.shape, np.float32)
            out[name][mask] = value
        return out

    def to_tensors(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Packed bits [ceil(n / 8)] by tensor name, for a tensor file."""
        return {n: np.packbits(m.reshape(-1)) for n, m in self.active.items()}

    @classmethod
    def from_tensors(cls, packed: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> ElementMask:
        """Read the bits that `to_tensors` wrote for tensors of these shapes. Raises `BundleError` if a tensor is
        unknown, or its bits are of another number or type, or not 0 behind the last one."""
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
            flags = np.unpackbits(bits).astype(np.bool_)
            if flags[count:].any():
                raise BundleError(f"mask of {name}", expected=f"0 behind its {count} bits")
            active[name] = flags[:count].reshape(shape)
        return cls(active)
