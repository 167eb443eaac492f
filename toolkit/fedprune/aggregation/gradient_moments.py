"""How far devices moved per step, summed: what curvature scores are made from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import FixedSum, Index, Range
from fedprune.aggregation.layout import to_global, to_layout
from fedprune.model.architecture import TensorSpec
from fedprune.model.selection import Selection

_STEP_RANGE = Range(-2)
"""Movement per step, saturated at 1/4: its square must keep its digits where it is small, not where it is absurd."""
_STEP_SQUARE_RANGE = Range(-4)


class GradientMoments:
    """Order-free sums of u_k = Δ_k / steps_k and of its square, per coordinate.

    Args:
        specs: The tensors.

    Attributes:
        first: Σ n_k·u_k by tensor, in the fold's layout.
        second: Σ n_k·u_k², the same way.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = {t.name: t for t in specs}
        self.first = {n: FixedSum(t.shape, _STEP_RANGE) for n, t in self._specs.items()}
        self.second = {n: FixedSum(t.shape, _STEP_SQUARE_RANGE) for n, t in self._specs.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def add(
        self,
        name: str,
        moved: npt.NDArray[np.float64],
        weight: int,
        steps: int,
        pairs: Collection[tuple[Index, Index]],
    ) -> None:
        """Add n_k·u_k and n_k·u_k².

        Args:
            name: The tensor.
            moved: Δ_k, of the submodel's shape; used up.
            weight: n_k.
            steps: Optimiser steps behind it.
            pairs: Where the submodel's tensor lies in the sums, as `fedprune.aggregation.layout.places` says.
        """
        moved /= steps
        np.clip(moved, -_STEP_RANGE.bound, _STEP_RANGE.bound, out=moved)
        for at, part in pairs:
            self.first[name].add(moved[part], weight, at)
        moved *= moved
        for at, part in pairs:
            self.second[name].add(moved[part], weight, at)

    def merge(self, other: GradientMoments, layout: Selection, theirs: Selection) -> None:
        """Add sums of the same tensors that lie in another layout."""
        for mine, more in ((self.first, other.first), (self.second, other.second)):
            merge_sums(mine, more, self._specs.values(), layout, theirs)

    def sums(self, name: str, layout: Selection) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Σ n_k·u_k and Σ n_k·u_k², in the model's order."""
        spec = self._specs[name]
        first, second = self.first[name].value(), self.second[name].value()
        return to_global(first, spec, layout), to_global(second, spec, layout)


def merge_sums(
    mine: dict[str, FixedSum],
    more: dict[str, FixedSum],
    specs: Iterable[TensorSpec],
    layout: Selection,
    theirs: Selection,
) -> None:
    """Add sums that lie in another layout, for the tensors that they are of; there must be room for their weight."""
    for spec in specs:
        if spec.name in mine:
            for a, b in zip(mine[spec.name].limbs, more[spec.name].limbs, strict=True):
                a += to_layout(to_global(b, spec, theirs), spec, layout).astype(a.dtype, copy=False)
