"""FedAsync (Xie et al. 2019), FedFix (Fraboni et al. 2022) and FedBuff (Nguyen et al. 2022): no device waits.

All three train the whole model everywhere, unless `densities` or the job's `density` say otherwise. They differ in when
the model moves and by what: `fedprune.jobs.update_weights` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Decay, Mixing, Schedule, Staleness
from fedprune.strategies.aggregators import Aggregator, DeltaMean, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.methods.fedavg import FedAvg
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class AsynchronousOptions:
    """Options of all three strategies.

    Attributes:
        densities: Widths by tier; empty for the whole model everywhere, or the job's `density`.
        rate: η_g, how far the model goes.
        staleness: s(k): `constant`, `polynomial` or `hinge`.
        a: As in `fedprune.jobs.schedule.Staleness`.
        b: Where the hinge is.
        max_staleness: Staler updates don't count, and their devices are asked again; 0 for no limit.
        concurrent: How many devices work at a time; 0 for all.
        evaluate_every: Rounds between evaluations of the model.
        mu: µ of the pull µ/2 · |w − w_sent|² on the board.
    """

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    rate: float = 1.0
    staleness: Decay = "constant"
    a: float = bounded(0.5, 0, 1e6)
    b: int = bounded(4, 0, 10**6)
    max_staleness: int = 0
    concurrent: int = 0
    evaluate_every: int = 1
    mu: float = bounded(0.0, 0, 1e6)


@dataclass(frozen=True)
class FedAsyncOptions(AsynchronousOptions):
    """Options of `fedasync`, which `docs/strategies/fedasync.md` explains."""

    rate: float = bounded(0.6, 0, 1, above=True)
    staleness: Decay = "polynomial"
    mixing: Literal["damped", "share"] = "damped"


@dataclass(frozen=True)
class FedFixOptions(AsynchronousOptions):
    """Options of `fedfix`, which `docs/strategies/fedfix.md` explains."""

    window_s: float = bounded(60.0, 1e-3, 1e8)
    mixing: Literal["unbiased", "share"] = "unbiased"


@dataclass(frozen=True)
class FedBuffOptions(AsynchronousOptions):
    """Options of `fedbuff`, which `docs/strategies/fedbuff.md` explains."""

    staleness: Decay = "polynomial"
    buffer: int = bounded(10, 1, 10**6)


def fedasync(job: Job) -> Strategy:
    """Every update moves the model as it comes (Xie et al. 2019, Alg. 1). Raises `ConfigError`."""
    options = read_options(job, FedAsyncOptions)
    # An update is the model's only one when it counts, so its samples can't weigh against others'.
    return _asynchronous_strategy(job, options, Mean(weighting="uniform"), options.mixing, arrivals=1)


def fedfix(job: Job) -> Strategy:
    """The model moves at the end of every window (Fraboni et al. 2022, FedFix). Raises `ConfigError`."""
    options = read_options(job, FedFixOptions)
    kind = DeltaMean if options.mixing == "unbiased" else Mean
    aggregator = kind(rule="fill", weighting="uniform")
    return _asynchronous_strategy(job, options, aggregator, options.mixing, window_s=options.window_s)


def fedbuff(job: Job) -> Strategy:
    """The model moves by the mean of every K moves (Nguyen et al. 2022, Alg. 1). Raises `ConfigError`."""
    options = read_options(job, FedBuffOptions)
    aggregator = DeltaMean(rule="fill", weighting="uniform")
    return _asynchronous_strategy(job, options, aggregator, "damped", arrivals=options.buffer)


def _asynchronous_strategy(
    job: Job,
    options: AsynchronousOptions,
    aggregator: Aggregator,
    mixing: Mixing,
    *,
    arrivals: int = 0,
    window_s: float = 0.0,
) -> Strategy:
    try:
        schedule = Schedule(
            "asynchronous",
            arrivals=arrivals,
            window_s=window_s,
            staleness=Staleness(options.staleness, options.a, options.b),
            max_staleness=options.max_staleness,
            mixing=mixing,
            rate=options.rate,
            concurrent=options.concurrent,
            evaluate_every=options.evaluate_every,
        )
    except ConfigError as error:
        # `Schedule` names its own fields; the user set them among the options.
        raise error.with_subject(error.description, ("job", "options", *error.path[1:])) from error
    return FedAvg(
        job.strategy,
        aggregator=aggregator,
        # An option of 0 leaves the pull to the job's recipe.
        mu=options.mu or None,
        inputs="updates",
        allocator=density_allocator(job, options.densities, default=(1.0,)),
        schedule=schedule,
    )
