"""Every strategy by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedprune.core.errors import ConfigError, meant
from fedprune.jobs.job import Job
from fedprune.strategies.methods.asynchronous import fedasync, fedbuff, fedfix
from fedprune.strategies.methods.autoflip import autoflip
from fedprune.strategies.methods.ca_hfp import ca_hfp
from fedprune.strategies.methods.fedavg import fedavg, fedprox
from fedprune.strategies.methods.fedobp import fedobp
from fedprune.strategies.methods.fedper import fedper, history, local
from fedprune.strategies.methods.fedprune import fedprune
from fedprune.strategies.methods.fiarse import fiarse
from fedprune.strategies.methods.heterofl import fedrolex, heterofl
from fedprune.strategies.methods.plain import plain
from fedprune.strategies.methods.pr_fl import pr_fl
from fedprune.strategies.methods.robust import robust
from fedprune.strategies.methods.subflot import subflot
from fedprune.strategies.privacy_checks import check_private
from fedprune.strategies.schedule_override import scheduled
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.user_strategies import own_strategy

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

    The option `robust` goes with every strategy: it wraps the aggregator (`fedprune.strategies.methods.robust`). The
    job's `schedule` takes the place of the strategy's own (`fedprune.strategies.schedule_override`).

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
