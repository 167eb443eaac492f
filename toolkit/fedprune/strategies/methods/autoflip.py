"""AutoFLIP (arXiv 2405.10271): devices explore once, and elements that they don't move far are masked.

The *guidance* of an element is the squared distance that explorers moved it.
`docs/strategies/autoflip.md` has equations, readings and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.element_mask import apply_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection, mesh
from fedprune.strategies.aggregators import VELOCITY, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.element_masks import MaskedElements, global_mask, masked_submodel
from fedprune.strategies.importance.element_ranking import prunable, quantile
from fedprune.strategies.importance.scoring import order_scores, rank_channels
from fedprune.strategies.importance.structured_from_mask import surviving_selection, survivors
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, NewMemory, Ranking, RoundClosing, Scene, Submodel, Turn, UpdateReport

NAME = "autoflip"

# Memory: per explorer G_k = (w_k^exp − w_0)², float32, as large as its submodel, and the submodel's widths.
_GUIDANCE = "guidance/"
_WIDTHS = "/widths"

WarmStart = Literal["init", "explored_mean"]


@dataclass(frozen=True)
class AutoFlipOptions:
    """Options of `autoflip`, which `docs/strategies/autoflip.md` explains.

    Attributes:
        pruned_share: Share of elements, those with the least guidance, that are masked.
        exploration_epochs: Most epochs of round 1; `patience` is for its early stopping.
        server_momentum: β of the damped momentum, from round 2 on.
        lr_decay: Factor per round on the learning rate, from round 3 on.
        warm_start: Whether the model stays the initial one in round 1, or moves to the explorers' mean.
        structured: Whether submodels lose the channels that masks leave without weights.
        masked_share: Share of masked weights from which a channel counts as one without weights.
        densities: The tiers of devices (`density_allocator`).
    """

    pruned_share: float = bounded(0.3, 0, 1, below=True)
    exploration_epochs: int = bounded(150, 1, 10_000)
    patience: int = bounded(40, 0, 10_000)
    server_momentum: float = bounded(0.9, 0, 1, below=True)
    lr_decay: float = bounded(0.99, 1e-3, 1)
    warm_start: WarmStart = "init"
    structured: bool = True
    masked_share: float = bounded(1.0, 1e-3, 1)
    densities: tuple[float, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class AutoFlip(MaskedElements):
    """Ranks elements by how far the round's participants moved them when they explored. With the option `structured`,
    submodels don't have the channels that masks leave without weights."""

    options: AutoFlipOptions = field(default_factory=AutoFlipOptions)

    @property
    def is_device_independent(self) -> bool:
        return True

    def rank(self, scene: Scene) -> Ranking:
        """Rank elements by +∞ if they stay and −∞ if they are masked; channels that are left come first, in their own
        order."""
        own_order = rank_channels(order_scores(scene.architecture))
        # The first round explores: there is no guidance yet.
        mask = ALL_ACTIVE if scene.round == 1 else self._round_mask(scene)
        if not mask:
            return Ranking(own_order)
        order = {n: np.where(m, np.inf, -np.inf).astype(np.float32) for n, m in mask.items()}
        if not self.options.structured:
            return Ranking(own_order, order)
        alive = survivors(scene.architecture, mask, share=self.options.masked_share)
        return Ranking(surviving_selection(Selection.full(scene.architecture), alive).ranks, order)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        """The explorers' guidance, in the first round."""
        if scene.round > 1:
            return {}
        names = self._maskable_names(scene.architecture)
        return {_GUIDANCE + r.cut.turn.device: _guidance(r, names) for r in reports()}

    def extract(self, cut: Cut) -> Submodel:
        if not self.options.structured:
            return super().extract(cut)
        return without_empty_channels(cut, self.options.masked_share)

    def reconstruct(self, report: UpdateReport) -> Submodel:
        """The submodel with all channels of its widths: cut ones as they were sent, masked elements as 0."""
        cut, trained = report.cut, report.trained
        if not self.options.structured or not trained.mask:
            return Submodel(trained.selection, trained.tensors)
        sent_values = masked_submodel(cut, cut.selection, global_mask(cut)).tensors
        full_values = cut.selection.scatter(sent_values, cut.scene.model)
        return Submodel(cut.selection, cut.selection.gather(trained.selection.scatter(trained.tensors, full_values)))

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """A long first round, then a learning rate that decays. However far an explorer got counts, as in the authors'
        code: early stopping doesn't take it back to its best epoch."""
        options = self.options
        if turn.round > 1:
            return replace(recipe, lr=recipe.lr * options.lr_decay ** (turn.round - 2))
        return replace(
            recipe, epochs=options.exploration_epochs, patience=options.patience, best_epoch=False, max_steps=0
        )

    def _round_mask(self, scene: Scene) -> ElementMask:
        explorers = sorted(n.removeprefix(_GUIDANCE) for n in scene.memory if n.startswith(_GUIDANCE))
        if not explorers or not self.options.pruned_share:
            return ALL_ACTIVE
        # Guidance of the round's participants, as in the paper; a round without any explorer takes all explorers'.
        present_explorers = [d for d in scene.participants if d in set(explorers)]
        guidance = _mean_guidance(scene, present_explorers or explorers, self._maskable_names(scene.architecture))
        scaled = {n: _scaled_guidance(v) for n, v in guidance.items()}
        rankable = [v[np.isfinite(v)] for v in scaled.values()]
        if not any(v.size for v in rankable):
            return ALL_ACTIVE
        limit = quantile(rankable, self.options.pruned_share)
        return {n: v > limit for n, v in scaled.items()}

    def _maskable_names(self, architecture: Architecture) -> tuple[str, ...]:
        return prunable(architecture, (TensorKind.BIAS,))


@dataclass(frozen=True)
class DampedMean(Mean):
    """A mean with damped momentum from round 2 on; round 1 takes the plain mean of the explorers' models. What the
    first mask prunes begins at 0."""

    def close(
        self, fold: Fold, scene: Scene, rate: float, reports: Callable[[], Iterator[tuple[UpdateReport, Submodel]]]
    ) -> RoundClosing:
        if scene.round == 1:
            # The explorers' mean is a new start, not a move that momentum should carry on.
            return RoundClosing(fold.close()[0])
        closing = super().close(fold, scene, rate, reports)
        # Round 2 is the first with a mask. What it prunes begins at 0 instead of decaying from its first value.
        if scene.round != 2:
            return closing
        report = next((r for r, _ in reports()), None)
        # All devices of a round have one mask, so any report tells it.
        mask = ALL_ACTIVE if report is None else global_mask(report.cut)
        memories = {n: apply_mask(mask, v) if n == VELOCITY else v for n, v in closing.memories.items()}
        return RoundClosing(apply_mask(mask, closing.model), dict(memories))


def autoflip(job: Job) -> Strategy:
    options = read_options(job, AutoFlipOptions)
    return AutoFlip(
        NAME,
        options=options,
        aggregator=DampedMean(server_momentum=options.server_momentum, damped=True),
        inputs="measurements",
        allocator=density_allocator(job, options.densities),
        exploration_rounds=1,
        exploration_updates_model=options.warm_start == "explored_mean",
        uses_masks=True,
    )


def without_empty_channels(cut: Cut, share: float) -> Submodel:
    """A masked slice of the global model, without the channels that the mask leaves empty; `share` is as for
    `survivors`."""
    mask = global_mask(cut)
    kept_channels = (
        surviving_selection(cut.selection, survivors(cut.scene.architecture, mask, share=share))
        if mask
        else cut.selection
    )
    return masked_submodel(cut, kept_channels, mask)


def _guidance(report: UpdateReport, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """G_k = (w_k^exp − w_0)² of one explorer, with its widths: it had the first channels of each group."""
    trained = report.trained
    guidance: dict[str, npt.NDArray[Any]] = {_WIDTHS: np.array(trained.selection.widths, np.int64)}
    for name in names:
        indices = mesh(trained.selection.maps(name))
        delta = trained.tensors[name].astype(np.float64) - report.cut.scene.model[name][indices]
        guidance[name] = (delta * delta).astype(np.float32)
    return guidance


def _mean_guidance(scene: Scene, devices: list[str], names: tuple[str, ...]) -> dict[str, npt.NDArray[np.float64]]:
    """The mean over explorers that hold an element; NaN where none does."""
    shapes = {n: scene.architecture.by_name[n].shape for n in names}
    sums = {n: np.zeros(s) for n, s in shapes.items()}
    counts = {n: np.zeros(s, np.int64) for n, s in shapes.items()}
    for device in devices:
        guidance = scene.memory[_GUIDANCE + device]
        selection = Selection.of(scene.architecture, guidance[_WIDTHS].tolist())
        for name in names:
            indices = mesh(selection.maps(name))
            sums[name][indices] += guidance[name]
            counts[name][indices] += 1
    return {n: np.where(counts[n] > 0, sums[n] / np.maximum(counts[n], 1), np.nan) for n in names}


def _scaled_guidance(guidance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A tensor's guidance, scaled from 0 to 1. Elements that can't be compared are +∞, which no mask removes: those
    that no explorer held, and those of tensors whose elements are all alike."""
    explored = guidance[~np.isnan(guidance)]
    scaled = np.full(guidance.shape, np.inf)
    if not explored.size or explored.min() == explored.max():
        return scaled
    low, span = float(explored.min()), float(explored.max() - explored.min())
    scaled[~np.isnan(guidance)] = (explored - low) / span
    return scaled
