"""FedAvg (McMahan et al. 2017, Alg. 1), and FedProx, which is FedAvg with a pull (Li et al. 2020, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedprune.core.settings import bounded, choice_of
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import WEIGHTINGS, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn


@dataclass(frozen=True)
class FedAvgOptions:
    """Options of `fedavg`, which `docs/strategies/fedavg.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    weighting: str = choice_of("samples", WEIGHTINGS)
    server_momentum: float = bounded(0.0, 0, 0.999)
    lr_decay: float = bounded(1.0, 1e-3, 1)


@dataclass(frozen=True)
class FedProxOptions(FedAvgOptions):
    """Options of `fedprox`, which `docs/strategies/fedavg.md` explains."""

    mu: float = bounded(0.01, 0, 1e6)


@dataclass(frozen=True)
class FedAvg(Strategy):
    """A mean of what devices train.

    Attributes:
        mu: µ of the pull; None leaves it to the job's recipe.
        lr_decay: The learning rate of round t is lr · lr_decay^(t − 1).
    """

    mu: float | None = None
    lr_decay: float = 1.0

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        lr = recipe.lr if self.lr_decay == 1.0 else recipe.lr * self.lr_decay ** (turn.round - 1)
        return replace(recipe, lr=lr, proximal=recipe.proximal if self.mu is None else self.mu)


def fedavg(job: Job) -> Strategy:
    return _mean_strategy(job, read_options(job, FedAvgOptions), None)


def fedprox(job: Job) -> Strategy:
    options = read_options(job, FedProxOptions)
    return _mean_strategy(job, options, options.mu)


def _mean_strategy(job: Job, options: FedAvgOptions, mu: float | None) -> Strategy:
    return FedAvg(
        job.strategy,
        aggregator=Mean(server_momentum=options.server_momentum, weighting=options.weighting),
        mu=mu,
        lr_decay=options.lr_decay,
        inputs="sum",
        # FedAvg is defined for the whole model; only a job that asks for narrower ones gets them.
        allocator=density_allocator(job, options.densities, default=(1.0,)),
    )
