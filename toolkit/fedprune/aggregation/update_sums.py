"""The sums of a round's updates, and parts of such sums that other processes have made.

A fold (`fedprune.aggregation.fold`) checks each update and hands it to `UpdateSums`, which adds the update's tensors,
multiplied by its weight, and records in `coverage` which coordinates it holds. `UpdateSums.means` makes the means of
both. On request the movement per step and its square are summed, too.

Sums are in fixed point (`fedprune.aggregation.fixed_point`), and in the order of the first update's channels, its
*layout* (`fedprune.aggregation.layout`). Whole numbers add up exactly in any grouping. So a fold's work can be split
by tensors, by updates, or by both, over any number of processes and machines: each returns `PartialSums`, and
`UpdateSums.take` adds these to the same bits as one fold that did it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.compiled_kernels import Scattered
from fedprune.aggregation.fixed_point import FixedSum, Range
from fedprune.aggregation.layout import (
    Coverage,
    Expansion,
    in_order,
    into_sums,
    places,
    row_blocks,
    to_global,
    to_layout,
)
from fedprune.aggregation.round_means import RoundMeans
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import Active, Selection, mesh

Whole = npt.NDArray[np.int64]

# Which array: the kind of sum (`value`, `moved` or `square`), the tensor, and the limb (`fixed_point`).
Key = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class PartialSums:
    """The sums of one fold.

    Attributes:
        names: The tensors that it summed.
        layout: The order of channels in its arrays.
        shares: For each selection of channels, the weight of all updates with it.
        updates: Number of updates.
        arrays: The sums.
    """

    names: frozenset[str]
    layout: Selection
    shares: tuple[tuple[Selection, int], ...]
    updates: int
    arrays: dict[Key, Whole]

    @property
    def weight(self) -> int:
        return sum(weight for _, weight in self.shares)

    def same_updates(self, other: PartialSums) -> bool:
        """Whether another one's updates weigh and cover the same, in the same layout."""
        return (
            self.updates == other.updates
            and self.layout.digest == other.layout.digest
            and _counted(self) == _counted(other)
        )


def check_parts(parts: Sequence[PartialSums], architecture: Architecture, expected: Iterable[str]) -> None:
    """Make sure that sums of the same updates make up a model's, each tensor once. Raises `BundleError` if they
    don't."""
    names = [name for part in parts for name in part.names]
    if sorted(names) != sorted(expected):
        raise BundleError("partial sums", expected="each tensor of the model once", got=f"{len(names)} tensors")
    for part in parts:
        if part.layout.architecture.digest != architecture.digest:
            raise BundleError("partial sums are of another architecture")
        if not part.same_updates(parts[0]):
            raise BundleError("partial sums are of different updates")


def blocks(specs: Sequence[TensorSpec], most: int, least: int) -> list[frozenset[str]]:
    """Tensors dealt into `most` blocks of about the same size; fewer where they would have less than `least` numbers.

    A tensor is never split. The largest go first, each to the block that is smallest so far.
    """
    sizes = {spec.name: math.prod(spec.shape) for spec in specs}
    count = max(1, min(most, sum(sizes.values()) // max(1, least), len(sizes)))
    dealt: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        at = filled.index(min(filled))
        dealt[at].append(name)
        filled[at] += sizes[name]
    return [frozenset(names) for names in dealt if names]


def _counted(part: PartialSums) -> dict[str, int]:
    return {selection.digest: weight for selection, weight in part.shares}


# Updates that are added together: the sums are read and written once for all of them.
_TOGETHER = 8

# Movement per step, saturated at 1/4: its square must keep its digits where it is small, not where it is absurd.
_MOVE_RANGE = Range(-2)
_SQUARED_MOVE_RANGE = Range(-4)


def free_steps(steps: int, momentum: float) -> float:
    """How far a constant gradient of 1 moves in some steps from a standstill, in units of lr / (1 − momentum).

    The j-th step moves 1 − momentum^j of it: ten steps with momentum 0.9 move 4.1, not 10.
    """
    return steps - momentum * (1 - momentum**steps) / (1 - momentum)


class _Waiting(NamedTuple):
    """A checked update that is not in the sums yet."""

    selection: Selection
    values: Mapping[str, npt.NDArray[Any]]
    weight: int


class UpdateSums:
    """The sums of updates whose values and total weight are checked already.

    Args:
        base: The model that the round began with.
        specs: The tensors that are summed.
        spans: By tensor, the range of magnitudes that its sum accepts.
        evidence: Also sum gradient moments, per coordinate of trainable tensors.
        momentum: Of the devices' SGD; only evidence needs it.

    Attributes:
        coverage: Which updates hold what.
        moved: Σ n_k·u_k by tensor with u_k = Δ_k / `free_steps`, in the layout; empty without `evidence`.
        squared: Σ n_k·steps_k·u_k², the same way.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: Mapping[str, npt.NDArray[np.float32]],
        specs: Sequence[TensorSpec],
        spans: Mapping[str, Range],
        *,
        evidence: bool,
        momentum: float = 0.0,
    ) -> None:
        self._momentum = momentum
        self.coverage = Coverage(architecture)
        self._architecture, self._base, self._specs = architecture, base, specs
        self._values = {t.name: FixedSum(t.shape, spans[t.name]) for t in specs}
        self._observed = [t for t in specs if t.kind.trainable and evidence]
        self.moved = {t.name: FixedSum(t.shape, _MOVE_RANGE) for t in self._observed}
        self.squared = {t.name: FixedSum(t.shape, _SQUARED_MOVE_RANGE) for t in self._observed}
        self._waiting: list[_Waiting] = []

    def add(
        self,
        selection: Selection,
        values: Mapping[str, npt.NDArray[Any]],
        weight: int,
        steps: int,
        active: Active,
        *,
        copied: bool,
    ) -> None:
        """Add an update.

        Args:
            active: Per tensor that it holds only in part, which elements.
            copied: Whether its arrays were made for it alone: they then don't wait, which would take memory.
        """
        selection = self.coverage.known(selection)
        one = _Waiting(selection, values, weight)
        if copied:
            self._add_together([one], active)
        else:
            self._waiting.append(one)
        for spec in self._observed:
            self._add_moments(spec, one, steps, active)
        self.coverage.add(selection, weight, active)
        if len(self._waiting) >= _TOGETHER:
            self.settle()

    def settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        groups: dict[str, list[_Waiting]] = {}
        for one in waiting:
            first = in_order(self.coverage.expect_layout, one.selection)
            groups.setdefault(one.selection.digest if first else "", []).append(one)
        for alike in groups.values():
            self._add_together(alike, {})

    def arrays(self) -> dict[Key, npt.NDArray[np.int64]]:
        kinds = {"value": self._values, "moved": self.moved, "square": self.squared}
        return {
            (kind, name, i): limb
            for kind, sums in kinds.items()
            for name, total in sums.items()
            for i, limb in enumerate(total.limbs)
        }

    def take(self, parts: Sequence[PartialSums]) -> None:
        """Add sums of the same updates, which together hold all tensors. Raises `BundleError` if they are of other
        sums than these."""
        theirs = {key: value for part in parts for key, value in part.arrays.items()}
        for key, limb in self.arrays().items():
            found = theirs.get(key)
            if found is None or found.dtype != np.int64 or found.shape != limb.shape:
                raise BundleError(f"partial sums of {key[1]}", expected=f"int64 {limb.shape}")
        self.settle()
        their_layout = parts[0].layout
        layout = self.coverage.settle(their_layout)
        alike = in_order(layout, their_layout)
        for key, limb in self.arrays().items():
            spec, more = self._architecture.by_name[key[1]], theirs[key]
            limb += more if alike else to_layout(to_global(more, spec, their_layout), spec, layout)
        for selection, part in parts[0].shares:
            self.coverage.add(selection, part, {})

    def means(self, rule: str) -> RoundMeans:
        """The result of a rule of `fedprune.aggregation.fold`; nothing may be added before it is done."""
        self.settle()
        return RoundMeans(self._base, rule, self.coverage, self._values)

    def _add_together(self, alike: list[_Waiting], active: Active) -> None:
        """Add updates of equal selections, or of any that are not in the sums' order."""
        for spec in self._specs:
            self._add_tensor(spec, alike, active.get(spec.name))

    def _add_tensor(self, spec: TensorSpec, alike: list[_Waiting], mask: npt.NDArray[np.bool_] | None) -> None:
        rows = [one.values[spec.name] for one in alike]
        if mask is not None:
            rows = [row * mask for row in rows]  # np.where takes ten times as long
        weights, sums, layout = [one.weight for one in alike], self._values[spec.name], self.coverage.expect_layout
        if not spec.axes or in_order(layout, alike[0].selection):
            for at, part in places(layout, spec, alike[0].selection):
                sums.add_all([row[part] for row in rows], weights, at)
            return
        if self._scatter(spec, alike, rows):
            return
        whole = [Expansion(layout, spec, one.selection, row) for one, row in zip(alike, rows, strict=True)]
        spare: list[npt.NDArray[Any]] = []
        for at in row_blocks(spec.shape):
            start, stop = at[0].start, at[0].stop
            spare = spare or [np.empty((stop - start, *spec.shape[1:]), row.dtype) for row in rows]
            parts = [each.rows(start, stop, out[: stop - start]) for each, out in zip(whole, spare, strict=True)]
            sums.add_all(parts, weights, at)

    def _scatter(self, spec: TensorSpec, several: list[_Waiting], rows: Sequence[npt.NDArray[Any]]) -> bool:
        """Add what is not in the sums' order, number by number, if that is compiled."""
        if not compiled_kernels.in_use():
            return False
        grids = [into_sums(self.coverage.expect_layout, spec, one.selection) for one in several]
        scattered = [
            Scattered(grid.rows, grid.columns, row, one.weight)
            for grid, row, one in zip(grids, rows, several, strict=True)
            if grid is not None
        ]
        return len(scattered) == len(grids) and self._values[spec.name].scatter(scattered, math.prod(spec.shape[2:]))

    def _add_moments(self, spec: TensorSpec, one: _Waiting, steps: int, active: Active) -> None:
        moved = np.array(one.values[spec.name], np.float64)
        moved -= self._base[spec.name][mesh(one.selection.maps(spec.name))]
        if spec.name in active:
            moved *= active[spec.name]
        moved /= free_steps(steps, self._momentum)
        spread = np.multiply(moved, math.sqrt(steps), out=np.empty_like(moved))
        for values in (moved, spread):
            np.clip(values, -_MOVE_RANGE.bound, _MOVE_RANGE.bound, out=values)
        spread *= spread
        pairs = list(places(self.coverage.expect_layout, spec, one.selection))
        for at, part in pairs:
            self.moved[spec.name].add(moved[part], one.weight, at)
            self.squared[spec.name].add(spread[part], one.weight, at)
