"""All shipped strategies by name, and the strategy of a job: a preset or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedprune.core.errors import ConfigError, did_you_mean, value_text
from fedprune.jobs.job import Job
from fedprune.strategies.job_schedule import with_schedule
from fedprune.strategies.methods.asynchronous import fedasync, fedbuff, fedfix
from fedprune.strategies.methods.autoflip import autoflip
from fedprune.strategies.methods.ca_hfp import ca_hfp
from fedprune.strategies.methods.drift import fedcm, feddyn, scaffold
from fedprune.strategies.methods.fedavg import fedavg, fedprox
from fedprune.strategies.methods.fedobp import fedobp
from fedprune.strategies.methods.fedper import fedper, local
from fedprune.strategies.methods.fedprune import fedprune
from fedprune.strategies.methods.fiarse import fiarse
from fedprune.strategies.methods.heterofl import fedrolex, heterofl
from fedprune.strategies.methods.history import history
from fedprune.strategies.methods.plain import plain_strategy
from fedprune.strategies.methods.pr_fl import pr_fl
from fedprune.strategies.methods.robust import RobustAggregator, Robustness
from fedprune.strategies.methods.subflot import subflot
from fedprune.strategies.privacy_checks import check_private, check_secure
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.user_strategies import user_strategy

# The option that goes with every strategy.
ROBUST_OPTION = "robust"

# Composes a strategy from a job and its `options`.
Preset = Callable[[Job], Strategy]

PRESETS: dict[str, Preset] = {
    "autoflip": autoflip,
    "ca-hfp": ca_hfp,
    "fedasync": fedasync,
    "fedavg": fedavg,
    "fedbuff": fedbuff,
    "fedcm": fedcm,
    "feddyn": feddyn,
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
    "plain": plain_strategy,
    "pr-fl": pr_fl,
    "scaffold": scaffold,
    "subflot": subflot,
}


def compose(job: Job, sizes: tuple[int, ...] = ()) -> Strategy:
    """The strategy of a job: a preset by its name, or a function of the user's as `package.module:function`. `sizes`
    are the channels per group of the job's model, where it is known, for a user's `recipe` that must be private.

    The option `robust` goes with every strategy: it wraps the aggregator (`fedprune.strategies.methods.robust`). The
    job's `schedule`, if any, replaces the strategy's own (`with_schedule`). Raises `ConfigError` if there is no such
    strategy, its options are wrong, or it can't keep the job's privacy.
    """
    options = dict(job.options)
    settings = options.pop(ROBUST_OPTION, None)
    strategy = with_schedule(_compose(replace(job, options=options)), job)
    if settings is not None:
        strategy = replace(strategy, aggregator=RobustAggregator(strategy.aggregator, Robustness.from_dict(settings)))
    return check_secure(job, check_private(job, strategy, sizes))


def _compose(job: Job) -> Strategy:
    preset = PRESETS.get(job.strategy)
    if preset is not None:
        return preset(job)
    if ":" in job.strategy:
        return user_strategy(job)
    # A user may have written package.module.function, with a dot where the colon belongs.
    module, _, function = job.strategy.rpartition(".")
    names = [*PRESETS, f"{module}:{function}"] if module else PRESETS
    raise ConfigError(
        f"unknown name {value_text(job.strategy)}{did_you_mean(job.strategy, names)}",
        path=("job", "strategy"),
        expected=f"{', '.join(sorted(PRESETS))}, or package.module:function",
    )
