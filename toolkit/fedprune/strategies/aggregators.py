"""Aggregators make the next global model from a round's updates: `Mean` averages models, `DeltaMean` their changes.

Each update is reconstructed (`lifted`: in the coordinates of the global model) and added to running sums (`Fold`), so
that no update need be kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.compiled_kernels import load_kernels
from fedprune.aggregation.fold import Fold, Rule
from fedprune.model.selection import ElementMask, Selection, Tensors
from fedprune.model.trainable import head_axes, matching_tensors
from fedprune.strategies.values import RoundClosing, Scene, Submodel, UpdateReport

# A row whose change is this small a share of it across its own direction has only decayed.
_PARALLEL_TOLERANCE = 1e-5

WEIGHTINGS = ("samples", "uniform")

# The collection of the server momentum.
VELOCITY = "velocity"


class Aggregator(ABC):
    """Turns a round's updates into the next global model."""

    @property
    def weighting(self) -> str:
        """`samples`: devices count by their training samples; `uniform`: all count the same."""
        return "samples"

    @property
    def is_per_tensor(self) -> bool:
        """Whether a tensor's sums depend on that tensor of the updates alone, so that they can be made in parts."""
        return False

    @abstractmethod
    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        """Empty sums for a round. `evidence`: also sum what curvature scores need."""

    @abstractmethod
    def add(self, fold: Fold, report: UpdateReport, lifted: Submodel) -> None:
        """Add a reconstructed update: all of it or, if this raises, nothing."""

    @abstractmethod
    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        """The next model; arguments as for `Strategy.close`."""


@dataclass(frozen=True)
class Mean(Aggregator):
    """The mean of what devices hand in, per coordinate over those that hold it (`fedprune.aggregation.fold`).

    Attributes:
        rule: `coverage`, `fill` or `zero`.
        server_momentum: β of FedAvgM, from 0 to below 1.
        weighting: `samples`, or `uniform`: all devices count alike (HeteroFL).
        damped: v ← β·v + (1 − β)·Δ instead of v ← β·v + Δ.
        only_changed: What of an update counts only if the device has changed it. `rows`: rows of the last layer. One
            that comes back as it was sent, or has only shrunk by weight decay, is of a class that the device has no
            sample of (HeteroFL's label rows: with `mask_absent_classes` such rows have no gradient). `elements`: single
            elements of all trained tensors (FIARSE divides by the devices with a change). Empty: all counts.
        excluded: Patterns of tensors that stay on the boards (FedPer): they keep their value.
    """

    rule: Rule = "coverage"
    server_momentum: float = 0.0
    weighting: str = "samples"
    damped: bool = False
    only_changed: Literal["", "rows", "elements"] = ""
    excluded: tuple[str, ...] = ()

    @property
    def is_per_tensor(self) -> bool:
        return not self.only_changed  # which rows changed depends on other tensors

    def fold(self, scene: Scene, *, evidence: bool) -> Fold:
        """Empty sums for a round. Raises `BundleError` if the model is not finite or there is no such rule,
        `ConfigError` if a pattern of `excluded` matches no tensor."""
        # Compiled sums pay only for large models: the size decides whether they are loaded.
        load_kernels(sum(tensor.size for tensor in scene.model.values()))
        setting, momentum = ("job", "options", "personal"), scene.recipe.momentum
        excluded = matching_tensors(scene.architecture, self.excluded, setting)
        return Fold(
            scene.architecture, scene.model, rule=self.rule, evidence=evidence, momentum=momentum, excluded=excluded
        )

    def add(self, fold: Fold, report: UpdateReport, lifted: Submodel) -> None:
        """Add an update: all of it or, if this raises, nothing. Raises as `Fold.add`."""
        # Without `reconstruct` these are the same tensors: checking a large model twice costs a pass over it.
        if lifted.tensors is not report.trained.tensors:
            fold.check(lifted.selection, lifted.tensors)
        mask, sent = self._counted_elements(report, lifted), self._subtrahend(report, lifted)
        fold.add(lifted.selection, lifted.tensors, report.weight, report.steps, mask=mask, sent=sent, checked=True)

    def _subtrahend(self, report: UpdateReport, lifted: Submodel) -> Tensors | None:
        """Weights, less which an update is averaged; None to average the update itself."""
        return None

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        velocity_before = scene.memory.get(VELOCITY) if self.server_momentum else None
        model, velocity = fold.close(self.server_momentum, velocity_before, rate=rate, damped=self.damped)
        return RoundClosing(model, {} if velocity is None else {VELOCITY: velocity})

    def _counted_elements(self, report: UpdateReport, lifted: Submodel) -> ElementMask:
        if not self.only_changed:
            return lifted.mask
        sent_weights = starting_weights(report, lifted)
        if self.only_changed == "rows":
            changed_elements = changed_rows(lifted, sent_weights, decays=report.cut.scene.recipe.weight_decay > 0)
        else:
            names = [t.name for t in lifted.selection.architecture.trainable]
            changed_elements = {n: np.asarray(lifted.tensors[n] != sent_weights[n]) for n in names}
        return intersection(lifted.mask, changed_elements)


@dataclass(frozen=True)
class DeltaMean(Mean):
    """The mean of moves: w_t + the mean of w_k − w_sent, whichever model a device began with.

    So aggregate asynchronous rounds: FedBuff (Nguyen et al. 2022, Alg. 1) and FedFix (Fraboni et al. 2022, eq. 2). In
    synchronous rounds it is `Mean`, bit for bit. Batch-norm statistics, which are measured, are averaged as they are.
    """

    def _subtrahend(self, report: UpdateReport, lifted: Submodel) -> Tensors:
        return starting_weights(report, lifted)


def starting_weights(report: UpdateReport, lifted: Submodel) -> Tensors:
    """The weights that an update started from, in the coordinates of its reconstruction. That is what the device was
    sent; where reconstruction led it to other coordinates (optimal transport), the model that its submodel was cut
    from."""
    sent_submodel = report.sent
    if same_coordinates(sent_submodel.selection, lifted.selection):
        return sent_submodel.tensors
    return lifted.selection.gather(report.cut.scene.model)


def same_coordinates(first: Selection, second: Selection) -> bool:
    """Whether two selections lay a submodel out alike: the same channels, in the same order."""
    return first is second or (
        first.widths == second.widths
        and all(np.array_equal(a[:k], b[:k]) for a, b, k in zip(first.ranks, second.ranks, first.widths, strict=True))
    )


def intersection(first: ElementMask, second: ElementMask) -> ElementMask:
    """Elements that are active in two masks."""
    return {**first, **{name: bits & first[name] if name in first else bits for name, bits in second.items()}}


def changed_rows(submodel: Submodel, before: Tensors, *, decays: bool) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks of the last layer's tensors: the rows that were trained. Raises `ConfigError` if the model has no last
    layer.

    Args:
        submodel: What was trained.
        before: What it began with.
        decays: Weight decay also shrinks rows that have no gradient, all of a row alike: a row that only became shorter
            was not trained. The bias goes with its weight's row.
    """
    axes = head_axes(submodel.selection.architecture)
    weight = next(iter(axes))
    values = (np.moveaxis(tensors[weight], axes[weight], 0) for tensors in (submodel.tensors, before))
    trained_rows, sent_rows = (v.reshape(len(v), -1) for v in values)
    is_changed = (trained_rows != sent_rows).any(axis=1)
    if decays:
        # Only weights decay, so the bias says nothing here: its row is judged by the weight's.
        is_changed &= ~_only_decayed(trained_rows, sent_rows)
    else:
        for name in list(axes)[1:]:
            is_changed |= submodel.tensors[name] != before[name]
    masks = {}
    for name, axis in axes.items():
        shape = submodel.tensors[name].shape
        broadcast_rows = is_changed.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        masks[name] = np.array(np.broadcast_to(broadcast_rows, shape))
    return masks


def _only_decayed(trained_rows: npt.NDArray[np.float32], sent_rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether each row is c times what it was, with 0 < c ≤ 1."""
    trained64, sent64 = trained_rows.astype(np.float64), sent_rows.astype(np.float64)
    # Above 0, so that a row of zeros doesn't divide by 0.
    squared_norms = np.maximum((sent64 * sent64).sum(axis=1), 1e-300)
    # Least squares: the c for which c times the old row is nearest to the new one.
    factor = (trained64 * sent64).sum(axis=1) / squared_norms
    residual = np.sqrt(((trained64 - factor[:, None] * sent64) ** 2).sum(axis=1))
    only_shrunk: npt.NDArray[np.bool_] = (
        (residual <= _PARALLEL_TOLERANCE * np.sqrt(squared_norms)) & (factor > 0) & (factor <= 1)
    )
    return only_shrunk
