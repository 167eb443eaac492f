"""Folding what devices learnt back into the global model, as their updates arrive.

A `Fold` keeps, per coordinate i of the global model, S_i = Σ_{k covers i} n_k·w_{k,i} as an order-free sum, and how
much weight M_i = Σ_{k covers i} n_k and N = Σ_k n_k it stands for. Since Σ n_k·w_{k,i} = M_i·w_{t,i} + Σ n_k·Δ_{k,i},
this is the sum of what devices learnt (Δ_k = w_k − w_t) without reading w_t for every update. A rule turns it into
the next model:

- `coverage`: w_i = S_i / M_i = w_{t,i} + Σ n_k Δ_{k,i} / M_i: the mean over the devices that hold the coordinate
  (HeteroFL, Diao et al. 2021, Sec. 3.2; weighted by samples as FedAvg, McMahan et al. 2017, Alg. 1).
- `fill`: w_i = (S_i + (N − M_i)·w_{t,i}) / N = w_{t,i} + Σ n_k Δ_{k,i} / N: submodels are filled up from w_t before
  the mean is taken (CA-HFP, Sec. II-A, eq. 4), so that devices without the coordinate vote for no change.
- `zero`: w_i = S_i / N: what a device doesn't hold counts as 0 (CA-HFP's ablation without reconstruction, Table II;
  eq. 13). It shows what reconstruction is good for, and is good for nothing else.

In the first two, a coordinate that no device holds keeps its bits. Where all hold it, all three are FedAvg, bit for
bit, by the same operations. Batch-norm statistics are always means over the devices that cover them.

A device may hold single elements (a mask): M_i then counts whose mask is 1 at i. A device may have begun with an
earlier model (asynchronous rounds): with `sent` its Δ is taken against what it was sent, and moves the model of now.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import (
    ClientUpdate,
    check_counts,
    check_fold_base,
    check_submodel,
    rebase_update,
)
from fedprune.aggregation.fixed_point import MAX_WEIGHT, Range
from fedprune.aggregation.layout import to_global
from fedprune.aggregation.round_means import ServerStep
from fedprune.aggregation.update_coverage import partial_masks
from fedprune.aggregation.update_sums import PartialSums, UpdateSums, check_partial_sums
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection, Tensors

Rule = Literal["coverage", "fill", "zero"]

Float64s = npt.NDArray[np.float64]


class Fold:
    """A streaming mean of updates, whose bits depend neither on their order nor on how their sums were split.

    Memory is 8 bytes per coordinate (with `evidence` 24), plus one tensor while closing, however many updates there
    are. Which coordinates an update covers is kept as its selection; only masks of single elements take an int64 per
    coordinate of their tensors. Up to eight checked updates wait until they are added together, which reads and writes
    the sums once for all: their arrays are held, not copied, and must stay as they are until the fold is closed. Raises
    `BundleError` if the base is not a finite float32 model of this architecture, there is no such rule or tensor, or
    momentum is out of range.

    Args:
        base: The global model w_t that devices' submodels were cut from.
        rule: `coverage`, `fill` or `zero`, as described above.
        evidence: Also sum movements per step and their squares, which curvature scores are made from.
        momentum: Of the devices' SGD, for evidence, from 0 to below 1.
        excluded: Names of tensors that are not shared (FedPer's personal layers): they keep their bits, and updates
            need not have them.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: Mapping[str, npt.NDArray[np.float32]],
        *,
        rule: Rule = "coverage",
        evidence: bool = False,
        momentum: float = 0.0,
        excluded: Collection[str] = (),
    ) -> None:
        if rule not in get_args(Rule):
            raise BundleError("aggregation rule", expected=" or ".join(get_args(Rule)), got=repr(rule))
        if not 0 <= momentum < 1:
            raise BundleError("momentum of the devices' SGD", expected="from 0 to below 1", got=momentum)
        unknown = sorted(set(excluded) - set(architecture.by_name))
        if unknown:
            raise BundleError(f"the model has no tensor {unknown[0]!r} to exclude")
        self.architecture = architecture
        self.base = check_fold_base(architecture, base)
        self.rule: Rule = rule
        self.evidence, self.momentum = evidence, momentum
        self.excluded = frozenset(excluded)
        self._collected: list[ClientUpdate] | None = None
        self._shared = tuple(t for t in architecture.tensors if t.name not in self.excluded)
        self._ranges = {t.name: _sum_range(t, self.base[t.name]) for t in architecture.tensors}
        self.clear()

    def clear(self) -> None:
        self.updates = 0
        model = (self.architecture, self.base, self._shared, self._ranges)
        self._sums = UpdateSums(*model, evidence=self.evidence, momentum=self.momentum)

    @contextmanager
    def collect_updates(self) -> Iterator[list[ClientUpdate]]:
        """Collect updates in a list instead of adding them. The sums and their weight stay as they are."""
        collected: list[ClientUpdate] = []
        self._collected = collected
        try:
            yield collected
        finally:
            self._collected = None

    def narrow_to(self, names: Collection[str]) -> Fold:
        """An empty fold of the same kind for some of the tensors, as a part of a fold that is split over processes."""
        fold = copy.copy(self)
        fold.excluded = self.excluded | {t.name for t in self.architecture.tensors if t.name not in names}
        # Only the tensors that are left need sums: each process of a split fold holds its share of the memory.
        fold._shared = tuple(t for t in self._shared if t.name in names)
        fold.clear()
        return fold

    @property
    def shared(self) -> tuple[TensorSpec, ...]:
        return self._shared

    def partial_sums(self) -> PartialSums:
        """The sums so far, for `add_partial_sums`; the fold must not be added to any more. Raises `BundleError` if
        nothing was added, or masks of single elements."""
        self._sums.add_waiting()
        coverage = self._sums.coverage
        shares = coverage.shares()
        # Masks have a count per coordinate, which a process would have to send along for every tensor.
        if shares is None:
            raise BundleError("sums of masked elements can't be split")
        names = frozenset(t.name for t in self._shared)
        return PartialSums(names, coverage.required_layout, shares, self.updates, self._sums.arrays())

    def add_partial_sums(self, partial_sums: Sequence[PartialSums]) -> None:
        """Add what narrowed folds have summed of the same updates, which together hold all tensors.

        Raises `BundleError` if they don't, or are of another architecture, of different updates, or of other sums than
        these, and `ProtocolError` if the total weight would be too large.
        """
        check_partial_sums(partial_sums, self.architecture, (t.name for t in self._shared))
        weight = partial_sums[0].weight
        if self.weight + weight > MAX_WEIGHT:
            raise ProtocolError("total weight of sums", expected=f"up to {MAX_WEIGHT}", got=self.weight + weight)
        self._sums.add_partial_sums(partial_sums)
        self.updates += partial_sums[0].updates

    @property
    def weight(self) -> int:
        """N, the weight of all updates."""
        return self._sums.coverage.weight

    @property
    def widths(self) -> tuple[int, ...]:
        """Per group the channels of the widest update; the model's own where masks of single elements were added, or
        nothing was."""
        shares = self._sums.coverage.shares() or ()
        return tuple(map(max, zip(*(s.widths for s, _ in shares), strict=True))) or self.architecture.sizes

    def sum_range(self, name: str) -> Range:
        """The bound and the resolution of a tensor's sum."""
        return self._ranges[name]

    def check(self, selection: Selection, submodel: Mapping[str, npt.NDArray[Any]]) -> None:
        """Check an update before any of it is added: sums can't be taken back. Raises as `check_submodel`."""
        bounds = {name: span.bound for name, span in self._ranges.items()}
        check_submodel(self.architecture, selection, submodel, bounds, self.excluded)

    def add(
        self,
        selection: Selection,
        submodel: Mapping[str, npt.NDArray[np.float32]],
        weight: int,
        steps: int = 1,
        *,
        mask: ElementMask = ALL_ACTIVE,
        sent: Mapping[str, npt.NDArray[np.float32]] | None = None,
        checked: bool = False,
    ) -> None:
        """Add one device's trained submodel: S_i += n_k·w_{k,i} at the coordinates that its selection holds.

        Raises `BundleError` or `ProtocolError` as `check`, or if weight or steps are out of range, the mask doesn't
        fit, or a rebased update is out of bounds. Nothing was added.

        Args:
            weight: n_k, the device's number of samples.
            steps: Optimiser steps that it took; only evidence needs them.
            mask: Which elements of the submodel count. The others are ignored.
            sent: The submodel that the device began with, where that is not the base's: w_t + (w_k − w_sent) counts
                instead of w_k (FedBuff, Nguyen et al. 2022, Alg. 1), except in batch-norm statistics.
        """
        check_counts(weight, steps, MAX_WEIGHT if self._collected is not None else MAX_WEIGHT - self.weight)
        if not checked:
            for tensors in (submodel,) if sent is None else (submodel, sent):
                self.check(selection, tensors)
        active = partial_masks(self.architecture, selection, mask, self.excluded)
        # Copies don't wait to be added together: with many waiting they would take as much memory as the sums.
        is_copied = sent is not None or bool(active)
        update = ClientUpdate(selection, submodel, weight, steps, mask, sent)
        if self._collected is not None:
            self._collected.append(update)
            return
        values: Mapping[str, npt.NDArray[Any]] = submodel
        if sent is not None:
            bounds = {name: span.bound for name, span in self._ranges.items()}
            values = rebase_update(self.architecture, selection, submodel, sent, self.base, bounds, self.excluded)
        self._sums.add(selection, values, weight, steps, active, copied=is_copied)
        self.updates += 1

    def close(
        self,
        server_momentum: float = 0.0,
        velocity: Mapping[str, npt.NDArray[np.float32]] | None = None,
        *,
        rate: float = 1.0,
        damped: bool = False,
    ) -> tuple[Tensors, Tensors | None]:
        """The next global model.

        With server momentum β (FedAvgM, Hsu et al. 2019, Sec. 4.3), v ← β·v + rate·(w̄ − w_t) and w ← w_t + v, for
        trainable tensors; where no device holds a coordinate neither v nor w changes. Raises `BundleError` if velocity,
        momentum or rate don't fit.

        Args:
            server_momentum: β, from 0 to below 1.
            velocity: v of the round before; empty or None in the first.
            rate: Share of the way from w_t to the mean: w ← w_t + rate·(w̄ − w_t) (FedAsync's α·s, Xie et al. 2019,
                Alg. 1; FedBuff's η_g). Statistics are measured, so that 1 is the most they go.
            damped: v ← β·v + (1 − β)·rate·(w̄ − w_t) instead (AutoFLIP's server): v is a moving average, not a sum.

        Returns:
            The next model, and v for the next call (None without momentum).
        """
        step = ServerStep(rate, server_momentum, damped)
        means = self._sums.means(self.rule)
        model: Tensors = {}
        next_velocity: Tensors = {}
        for spec in self.architecture.tensors:
            former_velocity = (velocity or {}).get(spec.name)
            if former_velocity is not None and former_velocity.shape != spec.shape:
                raise BundleError(f"shape of velocity of {spec.name}", expected=spec.shape, got=former_velocity.shape)
            if spec.name in self.excluded:
                model[spec.name] = self.base[spec.name].copy()
            # An empty fold: the model stays as it is, and so does what moves it.
            elif self._sums.coverage.layout is None:
                model[spec.name] = self.base[spec.name].copy()
                if server_momentum and spec.kind.is_trainable:
                    velocity_before = np.zeros(spec.shape) if former_velocity is None else former_velocity
                    next_velocity[spec.name] = velocity_before.astype(np.float32)
            elif server_momentum and spec.kind.is_trainable:
                model[spec.name], next_velocity[spec.name] = means.next_tensor_and_velocity(spec, step, former_velocity)
            else:
                model[spec.name] = means.next_tensor(spec, step)
        return model, next_velocity if server_momentum else None

    def mass(self, name: str) -> npt.NDArray[np.int64]:
        """M_i per coordinate of a tensor: the weight of the updates that hold it."""
        spec = self.architecture.by_name[name]
        if self._sums.coverage.layout is None or name in self.excluded:
            return np.zeros(spec.shape, np.int64)
        mass = self._sums.coverage.mass(spec)
        if mass is None:
            return np.full(spec.shape, self.weight, np.int64)
        return to_global(np.array(np.broadcast_to(mass, spec.shape)), spec, self._sums.coverage.layout)

    def movement(self, name: str) -> tuple[Float64s, Float64s, npt.NDArray[np.bool_]]:
        """First and second moments of a trainable tensor's movement per step; raises `BundleError` if they weren't
        summed.

        Returns:
            Per coordinate Σ n_k·u_k / M and Σ n_k·steps_k·u_k² / M with u_k = Δ_k / `free_steps` (saturated: u_k and
            √steps_k·u_k at ±1/4), and whether any device trained it.
        """
        spec = self.architecture.by_name.get(name)
        if not self.evidence or spec is None or not spec.kind.is_trainable:
            raise BundleError(f"the fold keeps no movement of {name}", hint="Make it with evidence=True.")
        mass = self.mass(name)
        layout = self._sums.coverage.layout
        if layout is None or name in self.excluded:
            return np.zeros(spec.shape), np.zeros(spec.shape), mass > 0
        divisor = np.maximum(mass, 1)
        first, second = (to_global(s[name].value(), spec, layout) for s in (self._sums.moved, self._sums.squared))
        return first / divisor, second / divisor, mass > 0


def _sum_range(spec: TensorSpec, base: npt.NDArray[np.float32]) -> Range:
    """The range of a tensor's sum. Weights may be up to 8, or 8 times the base's largest, and at most twice as much.
    Statistics follow the data's scale and have no natural bound: up to 2^24 or more, in two limbs."""
    return Range.around(base) if spec.kind.is_trainable else Range.around(base, min_exponent=24, limbs=2)
