"""Models with parts of a device's own: FedPer (Arivazhagan et al. 2019), nothing but own (`local`), and own history."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune.core.errors import ConfigError, shown
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.trainable import HEAD
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.objectives import AsJob
from fedprune.strategies.options import choice, number, read_options
from fedprune.strategies.roles import Cut, Objective, Personaliser, Report, Submodel, Turn
from fedprune.strategies.strategy import Inputs, Strategy


@dataclass(frozen=True)
class Options:
    """Settings of `fedper`.

    Attributes:
        personal: Patterns of the tensors that stay on the boards; `@head` stands for the last layer.
        densities: Widths by tier. Empty for the whole model everywhere, or the job's `density`.
        weighting: `samples`, or `uniform`.
    """

    personal: tuple[Any, ...] = (HEAD,)
    densities: tuple[Any, ...] = ()
    weighting: str = "samples"


@dataclass(frozen=True)
class LocalOptions:
    """Settings of `local`.

    Attributes:
        densities: Widths by tier. Empty for the whole model everywhere, or the job's `density`.
    """

    densities: tuple[Any, ...] = ()


@dataclass(frozen=True)
class HistoryOptions:
    """Settings of `history`.

    Attributes:
        alpha: Share of the global model in what a device is sent.
        mu: Strength of the pull towards what was sent, times the device's pruning rate: 2·λ of SubFLOT's penalty.
        densities: Widths by tier; empty to leave it to the job's `density` or the planner.
        weighting: `samples`, or `uniform`.
    """

    alpha: float = 0.5
    mu: float = 0.0
    densities: tuple[Any, ...] = ()
    weighting: str = "samples"


@dataclass(frozen=True)
class OwnHistory(Personaliser):
    """A device goes on from a mixture of the global model and of its own last one, at equal places.

    w ← α·w_t + (1 − α)·w_k where its last update holds the coordinate, w_t elsewhere: SubFLOT's fusion (arXiv
    2604.06631, eq. 6) without its transport, to tell what of its gain is memory alone.

    Attributes:
        alpha: α.
    """

    alpha: float = 0.5

    @property
    def as_trained(self) -> bool:
        return True

    def personalise(self, cut: Cut, submodel: Submodel) -> Submodel:
        """The mixture; the submodel as it is until the device has a history."""
        if cut.past is None or self.alpha == 1:
            return submodel
        model = cut.scene.model
        own = submodel.selection.gather(cut.past.selection.scatter(cut.past.over(model), model))
        tensors = {}
        for name, value in submodel.tensors.items():
            # w_t + (1 − α)·(w_k − w_t) leaves what the history doesn't hold as it is, bit for bit.
            moved = value + (1 - self.alpha) * (own[name].astype(np.float64) - value)
            tensors[name] = moved.astype(np.float32)
        return Submodel(submodel.selection, tensors, submodel.mask)

    def share(self, report: Report, lifted: Submodel) -> Submodel:
        return lifted


@dataclass(frozen=True)
class Pull(Objective):
    """The job's recipe with a pull that grows with what was pruned (SubFLOT, eq. 7 and 8).

    Attributes:
        mu: µ at a pruning rate of 1.
    """

    mu: float = 0.0

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, proximal=self.mu * turn.pruning_rate) if self.mu else recipe


def fedper(job: Job) -> Strategy:
    """The preset: some tensors are never shared; the others are FedAvg's.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, Options)
    if not options.personal or not all(isinstance(p, str) and p for p in options.personal):
        raise ConfigError(
            f"job: option personal of {job.strategy}", expected="patterns of tensors", got=shown(options.personal)
        )
    choice(job.strategy, "weighting", options.weighting, ("samples", "uniform"))
    return _own_parts(job, options.personal, options.densities, options.weighting, "sum")


def local(job: Job) -> Strategy:
    """The preset: every board trains alone, from the job's first model on, and nobody hears of it.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    return _own_parts(job, ("*",), read_options(job, LocalOptions).densities, "samples", "updates")


def _own_parts(
    job: Job, personal: tuple[str, ...], densities: tuple[float, ...], weighting: str, inputs: Inputs
) -> Strategy:
    return Strategy(
        job.strategy,
        aggregator=Mean(weighting=weighting, excluded=personal),
        objective=AsJob({"personal": personal}),
        inputs=inputs,
        allocator=dealt(job, densities, default=(1.0,)),
    )


def history(job: Job) -> Strategy:
    """The preset: nested slices whose devices remember their own last model.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, HistoryOptions)
    number(job.strategy, "alpha", options.alpha, 0, 1)
    number(job.strategy, "mu", options.mu, 0, 1e6)
    choice(job.strategy, "weighting", options.weighting, ("samples", "uniform"))
    return Strategy(
        job.strategy,
        aggregator=Mean(weighting=options.weighting),
        personaliser=OwnHistory(options.alpha),
        objective=Pull(options.mu),
        inputs="updates",
        allocator=dealt(job, options.densities),
        keeps_past=True,
    )
