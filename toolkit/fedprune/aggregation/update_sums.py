"""Sums of a round's updates, in fixed point, and which coordinates they cover.

Everything is summed in the layout of the first update's ranks; what a mean is made of stays here until a round closes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.aggregation.compiled_kernels import Apart
from fedprune.aggregation.coverage import Active, Coverage
from fedprune.aggregation.fixed_point import FixedSum, Range, run_all
from fedprune.aggregation.gradient_moments import GradientMoments, merge_sums
from fedprune.aggregation.layout import (
    Expansion,
    in_one_piece,
    in_order,
    into_sums,
    places,
    row_blocks,
    to_global,
    to_layout,
)
from fedprune.aggregation.partial_sums import Key, PartialSums
from fedprune.aggregation.round_means import RoundMeans
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import Selection, mesh

_TOGETHER = 8
"""So many updates wait at most: a model of float32 numbers each, read twice instead of sums four times as often."""


class _Waiting(NamedTuple):
    """A checked update that is not in the sums yet."""

    selection: Selection
    values: Mapping[str, npt.NDArray[Any]]
    weight: int


class UpdateSums:
    """What updates add up to. They are checked before they come here, and so is their total weight.

    Args:
        architecture: The model.
        base: The model that the round began with.
        specs: The tensors that are summed.
        spans: Which magnitudes they may have, by tensor.
        means: By variance whose law of total variance is wanted, the name of its mean.
        evidence: Also sum movements per step and their squares.
        threads: Threads that add; the bits don't depend on them.

    Attributes:
        coverage: Which updates hold what.
        movement: Movements per step, of no tensor without `evidence`.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: Mapping[str, npt.NDArray[np.float32]],
        specs: Sequence[TensorSpec],
        spans: Mapping[str, Range],
        means: Mapping[str, str],
        *,
        evidence: bool,
        threads: int,
    ) -> None:
        self.coverage = Coverage(architecture)
        self.movement = GradientMoments(t for t in specs if t.kind.trainable and evidence)
        self._architecture, self._base, self._specs = architecture, base, specs
        self._means, self._threads = means, threads
        rooms = in_one_piece(specs, np.zeros(sum(math.prod(t.shape) for t in specs)))
        self._values = {t.name: FixedSum(t.shape, spans[t.name], light=True, room=rooms[t.name]) for t in specs}
        self._spread = {
            name: FixedSum(base[name].shape, Range(2 * spans[mean].exponent + 2, 3)) for name, mean in means.items()
        }
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
            selection: Where its channels live.
            values: Its tensors.
            weight: What it counts for.
            steps: Optimiser steps behind it.
            active: Per tensor that it holds only in part, which elements.
            copied: Whether its arrays are made for it alone: they then don't wait, which would take memory.
        """
        selection = self.coverage.known(selection)
        self._make_room(self.coverage.weight + weight)
        one = _Waiting(selection, values, weight)
        if copied:
            self._add_together([one], active)
        else:
            self._waiting.append(one)
        more = [t for t in self._specs if t.name in self._means or t.name in self.movement]
        run_all([partial(self._add_beside, t, one, steps, active) for t in more], self._threads)
        self.coverage.add(selection, weight, active)
        if len(self._waiting) >= _TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Add what waits."""
        waiting, self._waiting = self._waiting, []
        groups: dict[str, list[_Waiting]] = {}
        for one in waiting:
            first = in_order(self.coverage.expect_layout, one.selection)
            groups.setdefault(one.selection.digest if first else "", []).append(one)
        for alike in groups.values():
            self._add_together(alike, {})

    def arrays(self) -> dict[Key, npt.NDArray[Any]]:
        """All sums, as they are kept."""
        first, second = self.movement.first, self.movement.second
        kinds = {"value": self._values, "spread": self._spread, "moved": first, "square": second}
        return {
            (kind, name, i): limb
            for kind, sums in kinds.items()
            for name, total in sums.items()
            for i, limb in enumerate(total.limbs)
        }

    def take(self, parts: Sequence[PartialSums]) -> None:
        """Add sums of the same updates, which together hold all tensors.

        Raises:
            BundleError: They are of other sums than these.
        """
        theirs = {key: value for part in parts for key, value in part.arrays.items()}
        for key, limb in self.arrays().items():
            found = theirs.get(key)
            if found is None or found.dtype != np.int64 or found.shape != limb.shape:
                raise BundleError(f"partial sums of {key[1]}", expected=f"int64 {limb.shape}")
        self.settle()
        self._make_room(self.coverage.weight + parts[0].weight)
        their_layout = parts[0].layout
        layout = self.coverage.settle(their_layout)
        alike = in_order(layout, their_layout)
        for key, limb in self.arrays().items():
            spec, more = self._architecture.by_name[key[1]], theirs[key]
            more = more if alike else to_layout(to_global(more, spec, their_layout), spec, layout)
            limb += more.astype(limb.dtype, copy=False)
        for selection, part in parts[0].shares:
            self.coverage.add(selection, part, {})

    def merge(self, other: UpdateSums) -> None:
        """Add sums of other updates of the same tensors."""
        if other.coverage.layout is None:
            return
        self.settle()
        other.settle()
        self._make_room(self.coverage.weight + other.coverage.weight)
        layout, theirs = self.coverage.settle(other.coverage.layout), other.coverage.layout
        merge_sums(self._values, other._values, self._specs, layout, theirs)
        merge_sums(self._spread, other._spread, self._specs, layout, theirs)
        self.movement.merge(other.movement, layout, theirs)
        self.coverage.merge(other.coverage)

    def means(self, rule: str) -> RoundMeans:
        """What a rule of `fedprune.aggregation.fold` makes of them; nothing may be added before it is done."""
        self.settle()
        return RoundMeans(self._architecture, self._base, rule, self.coverage, self._values, self._spread, self._means)

    def _make_room(self, weight: int) -> None:
        for sums in self._values.values():
            sums.make_room(weight)

    def _add_together(self, alike: list[_Waiting], active: Active) -> None:
        """Add updates of equal selections, or of any that are not in the sums' order."""
        run_all([partial(self._add_tensor, t, alike, active) for t in self._specs], self._threads)

    def _add_tensor(self, spec: TensorSpec, alike: list[_Waiting], active: Active) -> None:
        rows, mask = [one.values[spec.name] for one in alike], active.get(spec.name)
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
        """Add what is not in the sums' order, number by number, where there is a quick way to."""
        if not compiled_kernels.in_use():
            return False
        grids = [into_sums(self.coverage.expect_layout, spec, one.selection) for one in several]
        apart = [
            Apart(grid.rows, grid.columns, row, one.weight)
            for grid, row, one in zip(grids, rows, several, strict=True)
            if grid is not None
        ]
        return len(apart) == len(grids) and self._values[spec.name].scatter(apart, math.prod(spec.shape[2:]))

    def _add_beside(self, spec: TensorSpec, one: _Waiting, steps: int, active: Active) -> None:
        """Add to the sums that only some folds have."""
        selection, mask = one.selection, active.get(spec.name)
        pairs = list(places(self.coverage.expect_layout, spec, selection))
        if spec.name in self._means:
            mean = self._means[spec.name]
            off = np.array(one.values[mean], np.float64) - self._base[mean][selection.maps(mean)[0]]
            for at, part in pairs:
                self._spread[spec.name].add((off * off)[part], one.weight, at)
        if spec.name in self.movement:
            moved = np.array(one.values[spec.name], np.float64)
            moved -= self._base[spec.name][mesh(selection.maps(spec.name))]
            if mask is not None:
                moved *= mask
            self.movement.add(spec.name, moved, one.weight, steps, pairs)
