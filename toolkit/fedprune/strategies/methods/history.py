"""The preset `history`: devices begin with a mixture of the global model and their own last one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune.core.settings import bounded, choice_of
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import WEIGHTINGS, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Submodel, Turn


@dataclass(frozen=True)
class HistoryOptions:
    """Options of `history`, which `docs/strategies/fedper.md` explains."""

    alpha: float = bounded(0.5, 0, 1)
    mu: float = bounded(0.0, 0, 1e6)
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    weighting: str = choice_of("samples", WEIGHTINGS)


@dataclass(frozen=True)
class History(Strategy):
    """Start a device from a mixture of the global model and its own last one (`fuse_history`).

    That is SubFLOT (arXiv 2604.06631) without its transport: comparing both shows how much of SubFLOT's gain is due to
    memory. `mu` pulls weights towards those that were sent, in proportion to the device's pruning rate (eq. 7 and 8).
    """

    alpha: float = 0.5
    mu: float = 0.0

    def extract(self, cut: Cut) -> Submodel:
        return fuse_history(cut, super().extract(cut), self.alpha)

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, proximal=self.mu * turn.pruning_rate) if self.mu else recipe


def fuse_history(cut: Cut, submodel: Submodel, alpha: float) -> Submodel:
    """Mix the global model with a device's last update: w ← α·w_t + (1 − α)·w_k where the update has the coordinate,
    w_t elsewhere (SubFLOT, eq. 6)."""
    if cut.past is None or alpha == 1:
        return submodel
    model = cut.scene.model
    # The device's last update may have other channels than its new submodel: write it over the global model, and cut.
    own_model = cut.past.selection.scatter(cut.past.tensors_over(model), model)
    own_tensors = submodel.selection.gather(own_model)
    tensors = {}
    for name, value in submodel.tensors.items():
        # w_t + (1 − α)·(w_k − w_t) in float64 leaves coordinates that the update lacks as they are, bit for bit.
        tensors[name] = (value + (1 - alpha) * (own_tensors[name].astype(np.float64) - value)).astype(np.float32)
    return Submodel(submodel.selection, tensors, submodel.mask)


def history(job: Job) -> Strategy:
    """The strategy `history` for a job, from its options. Raises `ConfigError`."""
    options = read_options(job, HistoryOptions)
    return History(
        job.strategy,
        alpha=options.alpha,
        mu=options.mu,
        aggregator=Mean(weighting=options.weighting),
        inputs="updates",
        allocator=density_allocator(job, options.densities),
        keeps_past=True,
    )
