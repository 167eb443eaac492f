"""FedAsync (Xie et al. 2019), FedFix (Fraboni et al. 2022) and FedBuff (Nguyen et al. 2022): nobody waits for anybody.

All three train the whole model everywhere, unless `densities` or the job's `density` say otherwise. They differ in when
the model moves and by what: `fedprune.jobs.schedule` has the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from fedprune.aggregation.fold import Rule
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Decay, Mixing, Schedule, Staleness
from fedprune.strategies.aggregators import Aggregator, DeltaMean, Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.methods.fedavg import FedAvg
from fedprune.strategies.options import choice, number, read_options
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class Options:
    """What the three have in common.

    Attributes:
        densities: Widths by tier; empty for the whole model everywhere, or the job's `density`.
        weighting: `uniform`: devices count alike; or `samples`.
        rate: η_g, how far the model goes.
        staleness: s(k): `constant`, `polynomial` or `hinge`.
        a: As in `fedprune.jobs.schedule.Staleness`.
        b: Where the hinge is.
        max_staleness: Staler updates don't count, and their devices are asked again; 0 for no limit.
        concurrent: How many devices work at a time; 0 for all.
        evaluate_every: The model is evaluated every so many rounds.
        mu: µ of the pull µ/2 · |w − w_sent|² on the board.
    """

    densities: tuple[Any, ...] = ()
    weighting: str = "uniform"
    rate: float = 1.0
    staleness: str = "constant"
    a: float = 0.5
    b: int = 4
    max_staleness: int = 0
    concurrent: int = 0
    evaluate_every: int = 1
    mu: float = 0.0


@dataclass(frozen=True)
class OneByOne(Options):
    """Options of `fedasync`, which `docs/strategies/fedasync.md` explains."""

    rate: float = 0.6
    staleness: str = "polynomial"
    mixing: str = "damped"


@dataclass(frozen=True)
class Windows(Options):
    """Options of `fedfix`, which `docs/strategies/fedfix.md` explains."""

    window_s: float = 60.0
    mixing: str = "unbiased"
    rule: str = "fill"


@dataclass(frozen=True)
class Buffers(Options):
    """Options of `fedbuff`, which `docs/strategies/fedbuff.md` explains."""

    staleness: str = "polynomial"
    buffer: int = 10
    rule: str = "fill"
    server_momentum: float = 0.0


def fedasync(job: Job) -> Strategy:
    """The preset: every update moves the model as it comes (Xie et al. 2019, Alg. 1).

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, OneByOne)
    choice(job.strategy, "mixing", options.mixing, ("damped", "share"))
    number(job.strategy, "rate", options.rate, 0, 1, above=True)
    return _strategy(job, options, Mean(weighting=options.weighting), options.mixing, arrivals=1)


def fedfix(job: Job) -> Strategy:
    """The preset: the model moves at the end of every window (Fraboni et al. 2022, FedFix).

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, Windows)
    choice(job.strategy, "mixing", options.mixing, ("unbiased", "share"))
    number(job.strategy, "window_s", options.window_s, 1e-3, 1e8)
    kind = DeltaMean if options.mixing == "unbiased" else Mean
    aggregator = kind(rule=_rule(job, options.rule), weighting=options.weighting)
    return _strategy(job, options, aggregator, options.mixing, window_s=options.window_s)


def fedbuff(job: Job) -> Strategy:
    """The preset: the model moves by the mean of every K moves (Nguyen et al. 2022, Alg. 1).

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, Buffers)
    number(job.strategy, "buffer", options.buffer, 1, 10**6)
    number(job.strategy, "server_momentum", options.server_momentum, 0, 0.999)
    aggregator = DeltaMean(
        rule=_rule(job, options.rule), server_momentum=options.server_momentum, weighting=options.weighting
    )
    return _strategy(job, options, aggregator, "damped", arrivals=options.buffer)


def staleness_of(job: Job, decay: str, a: float, b: int, *, frozen: bool = False) -> Staleness:
    """A staleness function of a preset's options.

    Raises:
        ConfigError: There is no such function, or its numbers are out of range.
    """
    choice(job.strategy, "staleness", decay, ("constant", "polynomial", "hinge"))
    number(job.strategy, "a", a, 0, 1e6)
    number(job.strategy, "b", b, 0, 10**6)
    return Staleness(cast(Decay, decay), a, b, frozen)


def _rule(job: Job, rule: str) -> Rule:
    choice(job.strategy, "rule", rule, ("fill", "coverage"))
    return "fill" if rule == "fill" else "coverage"


def _strategy(
    job: Job, options: Options, aggregator: Aggregator, mixing: str, *, arrivals: int = 0, window_s: float = 0.0
) -> Strategy:
    choice(job.strategy, "weighting", options.weighting, ("uniform", "samples"))
    number(job.strategy, "mu", options.mu, 0, 1e6)
    try:
        schedule = Schedule(
            "asynchronous",
            arrivals=arrivals,
            window_s=window_s,
            staleness=staleness_of(job, options.staleness, options.a, options.b),
            max_staleness=options.max_staleness,
            mixing=cast(Mixing, mixing),
            rate=options.rate,
            concurrent=options.concurrent,
            evaluate_every=options.evaluate_every,
        )
    except ConfigError as error:
        what = error.what.replace("schedule: ", f"job: option of {job.strategy}: ")
        raise ConfigError(what, expected=error.expected, got=error.got) from error
    return FedAvg(
        job.strategy,
        aggregator=aggregator,
        mu=options.mu or None,
        inputs="updates",
        allocator=dealt(job, options.densities, default=(1.0,)),
        schedule=schedule,
    )
