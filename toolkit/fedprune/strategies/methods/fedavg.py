"""FedAvg (McMahan et al. 2017, Alg. 1), and FedProx, which is FedAvg with a pull (Li et al. 2020, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.options import choice, number, read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn


@dataclass(frozen=True)
class Options:
    """Options of `fedavg`, which `docs/strategies/fedavg.md` explains."""

    densities: tuple[Any, ...] = ()
    weighting: str = "samples"
    server_momentum: float = 0.0
    damped: bool = False
    lr_decay: float = 1.0


@dataclass(frozen=True)
class ProximalOptions(Options):
    """Options of `fedprox`, which `docs/strategies/fedavg.md` explains."""

    mu: float = 0.01


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
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    return _mean_of_all(job, read_options(job, Options), None)


def fedprox(job: Job) -> Strategy:
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, ProximalOptions)
    number(job.strategy, "mu", options.mu, 0, 1e6)
    return _mean_of_all(job, options, options.mu)


def _mean_of_all(job: Job, options: Options, mu: float | None) -> Strategy:
    choice(job.strategy, "weighting", options.weighting, ("samples", "uniform"))
    number(job.strategy, "server_momentum", options.server_momentum, 0, 0.999)
    number(job.strategy, "lr_decay", options.lr_decay, 1e-3, 1)
    return FedAvg(
        job.strategy,
        aggregator=Mean(server_momentum=options.server_momentum, weighting=options.weighting, damped=options.damped),
        mu=mu,
        lr_decay=options.lr_decay,
        inputs="sum",
        allocator=dealt(job, options.densities, default=(1.0,)),
    )
