"""FedAvg (McMahan et al. 2017, Alg. 1), and FedProx, which is FedAvg with a pull (Li et al. 2020, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.objectives import AsJob
from fedprune.strategies.options import choice, number, read_options
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class Options:
    """Settings of `fedavg`.

    Attributes:
        densities: Widths by tier. Empty for the whole model everywhere, or the job's `density`.
        weighting: `samples`, or `uniform`.
        server_momentum: β of FedAvgM (Hsu et al. 2019, Sec. 4.3).
        damped: v ← β·v + (1 − β)·Δ instead of v ← β·v + Δ.
        lr_decay: The learning rate of round t is lr · lr_decay^(t − 1).
    """

    densities: tuple[Any, ...] = ()
    weighting: str = "samples"
    server_momentum: float = 0.0
    damped: bool = False
    lr_decay: float = 1.0


@dataclass(frozen=True)
class ProximalOptions(Options):
    """Settings of `fedprox`: FedAvg's, and the pull.

    Attributes:
        mu: µ of µ/2 · |w − w_t|².
    """

    mu: float = 0.01


def fedavg(job: Job) -> Strategy:
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, Options)
    return _mean_of_all(job, options, AsJob({}, options.lr_decay))


def fedprox(job: Job) -> Strategy:
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, ProximalOptions)
    number(job.strategy, "mu", options.mu, 0, 1e6)
    return _mean_of_all(job, options, AsJob({"proximal": options.mu}, options.lr_decay))


def _mean_of_all(job: Job, options: Options, objective: AsJob) -> Strategy:
    choice(job.strategy, "weighting", options.weighting, ("samples", "uniform"))
    number(job.strategy, "server_momentum", options.server_momentum, 0, 0.999)
    number(job.strategy, "lr_decay", options.lr_decay, 1e-3, 1)
    return Strategy(
        job.strategy,
        aggregator=Mean(server_momentum=options.server_momentum, weighting=options.weighting, damped=options.damped),
        objective=objective,
        inputs="sum",
        allocator=dealt(job, options.densities, default=(1.0,)),
    )
