"""The sums of a round's updates, and parts of such sums that other processes have made.

A fold (`fedprune.aggregation.fold`) checks each update and hands it to `UpdateSums`, which adds the update's tensors,
multiplied by its weight, and records in `coverage` which coordinates it holds. `UpdateSums.means` makes the means of
both. On request the movement per step and its square are summed, too.

Sums are in fixed point (`fedprune.aggregation.fixed_point`), and in the order of the first update's channels, its
*layout* (`fedprune.aggregation.layout`). Whole numbers add up exactly in any grouping. So a fold's work can be split
by tensors, by updates, or by both, over any number of processes and machines: each returns `PartialSums`, and
`UpdateSums.add_partial_sums` adds these to the same bits as one fold that did it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.compiled_kernels import ScatteredRows
from fedprune.aggregation.fixed_point import FixedSum, Range
from fedprune.aggregation.layout import (
    Expansion,
    has_layout_ranks,
    index_pairs,
    map_into_sums,
    row_blocks,
    to_global,
    to_layout,
)
from fedprune.aggregation.round_means import RoundMeans
from fedprune.aggregation.update_coverage import UpdateCoverage
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import ElementMask, Selection, mesh

Integers = npt.NDArray[np.int64]

# Identifies an array: the kind of sum (`value`, `moved` or `square`), the tensor, and the limb (`fixed_point`).
ArrayKey = tuple[str, str, int]


@dataclass(frozen=True, eq=False)
class PartialSums:
    """The sums of one fold.

    Attributes:
        layout: The order of channels in its arrays.
        shares: For each selection of channels, the weight of all updates with it.
    """

    names: frozenset[str]
    layout: Selection
    shares: tuple[tuple[Selection, int], ...]
    updates: int
    arrays: dict[ArrayKey, Integers]

    @property
    def weight(self) -> int:
        return sum(weight for _, weight in self.shares)

    def has_same_updates(self, other: PartialSums) -> bool:
        """Whether these are sums of the same updates as another's, by their weights, channels and layout."""
        return (
            self.updates == other.updates
            and self.layout.digest == other.layout.digest
            and _weight_by_selection(self) == _weight_by_selection(other)
        )


def check_partial_sums(
    partial_sums: Sequence[PartialSums], architecture: Architecture, expected: Iterable[str]
) -> None:
    """Make sure that sums of the same updates make up a model's, each tensor once. Raises `BundleError` if they
    don't."""
    names = [name for sums in partial_sums for name in sums.names]
    if sorted(names) != sorted(expected):
        raise BundleError("partial sums", expected="each tensor of the model once", got=f"{len(names)} tensors")
    for sums in partial_sums:
        if sums.layout.architecture.digest != architecture.digest:
            raise BundleError("partial sums are of another architecture")
        if not sums.has_same_updates(partial_sums[0]):
            raise BundleError("partial sums are of different updates")


def tensor_blocks(specs: Sequence[TensorSpec], max_blocks: int, min_numbers: int) -> list[frozenset[str]]:
    """Tensors divided into `max_blocks` blocks of about the same size; fewer where these would have less than
    `min_numbers` numbers. A tensor is never split. The largest go first, each to the block that is smallest so far."""
    sizes = {spec.name: math.prod(spec.shape) for spec in specs}
    count = max(1, min(max_blocks, sum(sizes.values()) // max(1, min_numbers), len(sizes)))
    names_of_block: list[list[str]] = [[] for _ in range(count)]
    block_sizes = [0] * count
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        smallest = block_sizes.index(min(block_sizes))
        names_of_block[smallest].append(name)
        block_sizes[smallest] += sizes[name]
    return [frozenset(names) for names in names_of_block if names]


def _weight_by_selection(sums: PartialSums) -> dict[str, int]:
    return {selection.digest: weight for selection, weight in sums.shares}


# Updates that are added together: the sums are read and written once for all of them.
_UPDATES_AT_ONCE = 8

# Movement per step, saturated at 1/4: small movements, and their squares, must keep their digits; larger ones than that
# are absurd.
_MOVE_RANGE = Range(-2)
_SQUARED_MOVE_RANGE = Range(-4)


def free_steps(steps: int, momentum: float) -> float:
    """How far a constant gradient of 1 moves in some steps from a standstill, in units of lr / (1 − momentum).

    The j-th step moves 1 − momentum^j of it: ten steps with momentum 0.9 move 4.1, not 10.
    """
    return steps - momentum * (1 - momentum**steps) / (1 - momentum)


class _WaitingUpdate(NamedTuple):
    """A checked update that is not in the sums yet: several are added together."""

    selection: Selection
    values: Mapping[str, npt.NDArray[Any]]
    weight: int


class UpdateSums:
    """The sums of updates whose values and total weight are checked already.

    `spans` are, by tensor, the range of magnitudes that its sum accepts. With `evidence` gradient moments are summed,
    too, per coordinate of trainable tensors; `momentum` is that of the devices' SGD, which only evidence needs.

    Attributes:
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
        self.coverage = UpdateCoverage(architecture)
        self._architecture, self._base, self._specs = architecture, base, specs
        self._values = {t.name: FixedSum(t.shape, spans[t.name]) for t in specs}
        self._observed_specs = [t for t in specs if t.kind.is_trainable and evidence]
        self.moved = {t.name: FixedSum(t.shape, _MOVE_RANGE) for t in self._observed_specs}
        self.squared = {t.name: FixedSum(t.shape, _SQUARED_MOVE_RANGE) for t in self._observed_specs}
        self._waiting: list[_WaitingUpdate] = []

    def add(
        self,
        selection: Selection,
        values: Mapping[str, npt.NDArray[Any]],
        weight: int,
        steps: int,
        active: ElementMask,
        *,
        copied: bool,
    ) -> None:
        """Add an update; `active` is, per tensor that it holds only in part, which elements.

        If it was `copied`, its arrays were made for it alone: they don't wait, since that would take memory.
        """
        selection = self.coverage.shared_selection(selection)
        update = _WaitingUpdate(selection, values, weight)
        if copied:
            self._add_together([update], active)
        else:
            self._waiting.append(update)
        for spec in self._observed_specs:
            self._add_moments(spec, update, steps, active)
        self.coverage.add(selection, weight, active)
        if len(self._waiting) >= _UPDATES_AT_ONCE:
            self.add_waiting()

    def add_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        groups: dict[str, list[_WaitingUpdate]] = {}
        for update in waiting:
            is_in_order = has_layout_ranks(self.coverage.required_layout, update.selection)
            # Updates out of order are expanded to whole tensors, so that their selections may differ within a group.
            groups.setdefault(update.selection.digest if is_in_order else "", []).append(update)
        for group in groups.values():
            self._add_together(group, {})

    def arrays(self) -> dict[ArrayKey, npt.NDArray[np.int64]]:
        kinds = {"value": self._values, "moved": self.moved, "square": self.squared}
        return {
            (kind, name, i): limb
            for kind, sums in kinds.items()
            for name, fixed_sum in sums.items()
            for i, limb in enumerate(fixed_sum.limbs)
        }

    def add_partial_sums(self, partial_sums: Sequence[PartialSums]) -> None:
        """Add sums of the same updates, which together hold all tensors. Raises `BundleError` if they are of other
        sums than these."""
        their_arrays = {key: value for sums in partial_sums for key, value in sums.arrays.items()}
        for key, limb in self.arrays().items():
            array = their_arrays.get(key)
            if array is None or array.dtype != np.int64 or array.shape != limb.shape:
                raise BundleError(f"partial sums of {key[1]}", expected=f"int64 {limb.shape}")
        self.add_waiting()
        # The first sums may decide the layout; later ones may come from processes whose first update had other ranks.
        their_layout = partial_sums[0].layout
        layout = self.coverage.settle_layout(their_layout)
        same_order = has_layout_ranks(layout, their_layout)
        for key, limb in self.arrays().items():
            spec, addend = self._architecture.by_name[key[1]], their_arrays[key]
            limb += addend if same_order else to_layout(to_global(addend, spec, their_layout), spec, layout)
        for selection, weight in partial_sums[0].shares:
            self.coverage.add(selection, weight, {})

    def means(self, rule: str) -> RoundMeans:
        """The result of a rule of `fedprune.aggregation.fold`; nothing may be added before it is done."""
        self.add_waiting()
        return RoundMeans(self._base, rule, self.coverage, self._values)

    def _add_together(self, updates: list[_WaitingUpdate], active: ElementMask) -> None:
        """Add updates of equal selections, or of any that are not in the sums' order."""
        for spec in self._specs:
            self._add_tensor(spec, updates, active.get(spec.name))

    def _add_tensor(self, spec: TensorSpec, updates: list[_WaitingUpdate], mask: npt.NDArray[np.bool_] | None) -> None:
        rows = [update.values[spec.name] for update in updates]
        if mask is not None:
            rows = [row * mask for row in rows]  # np.where takes ten times as long
        weights = [update.weight for update in updates]
        sums, layout = self._values[spec.name], self.coverage.required_layout
        if not spec.axes or has_layout_ranks(layout, updates[0].selection):
            for sum_index, update_index in index_pairs(layout, spec, updates[0].selection):
                sums.add_rows([row[update_index] for row in rows], weights, sum_index)
            return
        if self._scatter(spec, updates, rows):
            return
        expansions = [Expansion(layout, spec, update.selection, row) for update, row in zip(updates, rows, strict=True)]
        buffers: list[npt.NDArray[Any]] = []
        for sum_index in row_blocks(spec.shape):
            start, stop = sum_index[0].start, sum_index[0].stop
            buffers = buffers or [np.empty((stop - start, *spec.shape[1:]), row.dtype) for row in rows]
            blocks = [
                expansion.rows(start, stop, out[: stop - start])
                for expansion, out in zip(expansions, buffers, strict=True)
            ]
            sums.add_rows(blocks, weights, sum_index)

    def _scatter(self, spec: TensorSpec, updates: list[_WaitingUpdate], rows: Sequence[npt.NDArray[Any]]) -> bool:
        """Add what is not in the sums' order, number by number, if that is compiled."""
        if not compiled_kernels.has_kernels():
            return False
        grids = [map_into_sums(self.coverage.required_layout, spec, update.selection) for update in updates]
        scattered = [
            ScatteredRows(grid.rows, grid.columns, row, update.weight)
            for grid, row, update in zip(grids, rows, updates, strict=True)
            if grid is not None
        ]
        return len(scattered) == len(grids) and self._values[spec.name].scatter(scattered, math.prod(spec.shape[2:]))

    def _add_moments(self, spec: TensorSpec, update: _WaitingUpdate, steps: int, active: ElementMask) -> None:
        movement = np.array(update.values[spec.name], np.float64)
        movement -= self._base[spec.name][mesh(update.selection.maps(spec.name))]
        if spec.name in active:
            movement *= active[spec.name]
        # Per step of a constant gradient: boards take unlike numbers of steps.
        movement /= free_steps(steps, self._momentum)
        scaled = np.multiply(movement, math.sqrt(steps), out=np.empty_like(movement))
        for values in (movement, scaled):
            # Movements were never checked against a bound: one that is out of range must not overflow its sum.
            np.clip(values, -_MOVE_RANGE.bound, _MOVE_RANGE.bound, out=values)
        scaled *= scaled
        pairs = list(index_pairs(self.coverage.required_layout, spec, update.selection))
        for sum_index, update_index in pairs:
            self.moved[spec.name].add(movement[update_index], update.weight, sum_index)
            self.squared[spec.name].add(scaled[update_index], update.weight, sum_index)
