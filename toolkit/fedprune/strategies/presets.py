"""Every strategy by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedprune.errors import ConfigError, meant
from fedprune.job import Job
from fedprune.strategies.asynchronous import fedasync, fedbuff, fedfix
from fedprune.strategies.autoflip import autoflip
from fedprune.strategies.ca_hfp import ca_hfp
from fedprune.strategies.fedavg import fedavg, fedprox
from fedprune.strategies.fedobp import fedobp
from fedprune.strategies.fedper import fedper, history, local
from fedprune.strategies.fedprune import fedprune
from fedprune.strategies.fiarse import fiarse
from fedprune.strategies.heterofl import fedrolex, heterofl
from fedprune.strategies.own import own_strategy
from fedprune.strategies.plain import plain
from fedprune.strategies.pr_fl import pr_fl
from fedprune.strategies.private import check_private
from fedprune.strategies.robust import robust
from fedprune.strategies.scheduling import scheduled
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.subflot import subflot

ROBUST = "robust"
"""The option that goes with every strategy."""

Preset = Callable[[Job], Strategy]
"""Composes a strategy from a job and its `options`."""

PRESETS: dict[str, Preset] = {
    "autoflip": autoflip,
    "ca-hfp": ca_hfp,
    "fedasync": fedasync,
    "fedavg": fedavg,
    "fedbuff": fedbuff,
    "fedfix": fedfix,
    "fedobp": fedobp,
    "fedper": fedper,
    "fedprox": fedprox,
    "fedrolex": fedrolex,
    "fiarse": fiarse,
    "heterofl": heterofl,
    "history": history,
    "local": local,
    "fedprune": fedprune,
    "plain": plain,
    "pr-fl": pr_fl,
    "subflot": subflot,
}


def compose(job: Job) -> Strategy:
    """The strategy of a job: a preset by its name, or a function of the user's as `package.module:function`.

    The option `robust` goes with every strategy: it wraps the aggregator (`fedprune.strategies.robust`). The job's
    `schedule` takes the place of the strategy's own (`fedprune.strategies.scheduling`).

    Raises:
        ConfigError: There is no such strategy, its options are wrong, or it can't keep the job's privacy.
    """
    options = dict(job.options)
    settings = options.pop(ROBUST, None)
    strategy = scheduled(_compose(replace(job, options=options)), job)
    return check_private(job, replace(strategy, aggregator=robust(strategy.aggregator, settings)))


def _compose(job: Job) -> Strategy:
    preset = PRESETS.get(job.strategy)
    if preset is not None:
        return preset(job)
    if ":" in job.strategy:
        return own_strategy(job)
    dotted = job.strategy.rpartition(".")
    names = [*PRESETS, f"{dotted[0]}:{dotted[2]}"] if dotted[0] else PRESETS
    raise ConfigError(
        f"job: no strategy is called {job.strategy!r}{meant(job.strategy, names)}",
        expected=f"{', '.join(sorted(PRESETS))}, or package.module:function",
    )
