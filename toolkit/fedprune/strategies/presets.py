"""Every strategy by its name, on the schedule that its job asks for, and whether it can be private."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, did_you_mean, value_text
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.methods.asynchronous import fedasync, fedbuff, fedfix
from fedprune.strategies.methods.autoflip import autoflip
from fedprune.strategies.methods.ca_hfp import ca_hfp
from fedprune.strategies.methods.fedavg import fedavg, fedprox
from fedprune.strategies.methods.fedobp import fedobp
from fedprune.strategies.methods.fedper import fedper, history, local
from fedprune.strategies.methods.fedprune import fedprune
from fedprune.strategies.methods.fiarse import fiarse
from fedprune.strategies.methods.heterofl import fedrolex, heterofl
from fedprune.strategies.methods.plain import plain_strategy
from fedprune.strategies.methods.pr_fl import pr_fl
from fedprune.strategies.methods.robust import robust_aggregator
from fedprune.strategies.methods.subflot import subflot
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.user_strategies import user_strategy
from fedprune.updates.codecs import AUTO, PLAIN
from fedprune.updates.privacy import LOCAL, SHARED

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
    "subflot": subflot,
}


def compose(job: Job) -> Strategy:
    """The strategy of a job: a preset by its name, or a function of the user's as `package.module:function`.

    The option `robust` goes with every strategy: it wraps the aggregator (`fedprune.strategies.methods.robust`). The
    job's `schedule`, if any, replaces the strategy's own (`with_schedule`). Raises `ConfigError` if there is no such
    strategy, its options are wrong, or it can't keep the job's privacy.
    """
    options = dict(job.options)
    settings = options.pop(ROBUST_OPTION, None)
    strategy = with_schedule(_compose(replace(job, options=options)), job)
    strategy = replace(strategy, aggregator=robust_aggregator(strategy.aggregator, settings))
    return check_secure(job, check_private(job, strategy))


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


SCHEDULE_KINDS = ("sync", "semi-async", "async")

# Keys of `Schedule` that both asynchronous kinds have, and those of each. Rounds in step have none.
_COMMON_KEYS = ("concurrent", "rate", "mixing", "keep", "staleness", "max_staleness", "score_every", "evaluate_every")
_KEYS_OF_KIND = {"semi-async": ("window_s", "least", "extension_s"), "async": ("arrivals",)}

# Settings of the job that only synchronous rounds have.
_SYNCHRONOUS_SETTINGS = ("over_selection", "in_flight")


def with_schedule(strategy: Strategy, job: Job) -> Strategy:
    """A strategy on the schedule that the job asks for, or on its own.

    `[job.schedule]` has `kind`, and keys of `fedprune.jobs.schedule.Schedule` that go with it:

    | kind | when the model moves | by default |
    |---|---|---|
    | `sync` | when all updates are in, or the deadline has passed | |
    | `semi-async` | at the end of a time window, by the updates in it | `window_s` is a tenth of the deadline |
    | `async` | after a number of updates | `arrivals` is half of the job's `devices` |

    An update of k models ago counts (k + 1)^-½ unless `staleness` is set, and counts as its difference from what the
    device was sent, as in FedBuff (Nguyen et al. 2022). Raises `ConfigError` if the schedule's settings are wrong, the
    strategy can't be moved to it, or the job has settings that mean nothing on it.
    """
    rescheduled = _with_own_schedule(strategy, job) if job.schedule else strategy
    if rescheduled.schedule is not None and rescheduled.schedule.asynchronous:
        for name in _SYNCHRONOUS_SETTINGS:
            if getattr(job, name):
                raise ConfigError(
                    ("job", name),
                    expected="0 in an asynchronous job, whose devices never wait for one another",
                    got=getattr(job, name),
                    hint="The schedule's concurrent says how many work at a time." if name == "in_flight" else "",
                )
    own_share = 0.0 if rescheduled.schedule is None else rescheduled.schedule.participation
    participation = own_share or job.participation
    if job.over_selection and participation == 1:
        raise ConfigError(
            ("job", "over_selection"),
            expected="a participation below 1, which leaves devices to ask beyond those that a round needs",
            got=f"{job.over_selection:g}, and everybody is asked",
        )
    return rescheduled


def _with_own_schedule(strategy: Strategy, job: Job) -> Strategy:
    schedule_table: dict[str, Any] = dict(job.schedule)
    # Before the kind, which may be the key that is misspelt.
    validation.check_keys(
        ("kind", *_COMMON_KEYS, *(key for keys in _KEYS_OF_KIND.values() for key in keys)),
        schedule_table,
        ("job", "schedule"),
    )
    if "kind" not in schedule_table:
        raise ConfigError(("job", "schedule", "kind"), expected=" or ".join(SCHEDULE_KINDS), got="nothing")
    kind = schedule_table.pop("kind")
    validation.check_word(("job", "schedule", "kind"), kind, SCHEDULE_KINDS)
    if kind == "sync":
        # Rounds in step have no window, staleness or rate; a key here means that another kind was meant.
        if schedule_table:
            raise ConfigError(
                "'sync'",
                path=("job", "schedule", "kind"),
                expected="no other key: rounds in step go by the job's own settings",
                got=", ".join(sorted(schedule_table)),
            )
        if strategy.schedule is None or not strategy.schedule.asynchronous:
            return strategy
    aggregator = strategy.aggregator
    averages_updates = (
        type(aggregator) in (Mean, DeltaMean) and strategy.has_plain_close and not strategy.exploration_rounds
    )
    # Who averages models on a schedule of its own does it by that schedule's arithmetic.
    if not averages_updates or (strategy.schedule is not None and type(aggregator) is Mean):
        raise ConfigError(
            f"with strategy {strategy.name}, which keeps its own",
            path=("job", "schedule"),
            expected="a strategy that averages updates, round by round or as moves",
            got=f"kind {kind!r}",
            hint="Leave [job.schedule] out; the strategy's own options are on its page in docs/strategies.",
        )
    if kind == "sync":
        return replace(strategy, schedule=None)
    validation.check_keys(
        (*_COMMON_KEYS, *_KEYS_OF_KIND[kind]), schedule_table, ("job", "schedule"), f"key of kind {kind!r}"
    )
    # As in FedBuff, whichever schedule it is: damped mixing, and (k + 1)^-½ for an update of k models ago.
    defaults: dict[str, dict[str, Any]] = {
        "semi-async": {"window_s": job.deadline_s / 10},
        "async": {"arrivals": max(1, job.devices // 2)},
    }
    schedule_table = {"mixing": "damped", "staleness": {"decay": "polynomial"}, **defaults[kind], **schedule_table}
    try:
        schedule = Schedule.from_dict({**schedule_table, "kind": "asynchronous"})
    except ConfigError as error:
        # `Schedule` names its own fields; the user wrote them below [job.schedule].
        raise error.with_subject(error.description, ("job", *error.path)) from error
    delta_mean = DeltaMean(**{f.name: getattr(aggregator, f.name) for f in fields(Mean)})
    return replace(strategy, schedule=schedule, aggregator=delta_mean)


def check_private(job: Job, strategy: Strategy) -> Strategy:
    """Check that a job's privacy can be kept by its strategy.

    With local noise a board releases its update, so that no use of it by the server costs more; the board must not send
    other measurements. With shared noise only the sum is released, so that a strategy that uses single updates is
    refused. Raises `ConfigError` if it can't; the message names the strategy and says why.

    Returns:
        The strategy.
    """
    if not job.privacy.is_on:
        return strategy
    if strategy.inputs == "measurements":
        raise ConfigError(
            f"with strategy {job.strategy}",
            path=("job", "privacy"),
            expected="a strategy whose boards send updates alone",
            got="one that also uses what boards measure on their samples, which no noise covers",
            hint="fedprune, fedavg and heterofl are some that can be private.",
        )
    if not job.privacy.is_local and (reader := _single_update_reader(job, strategy, (PLAIN,))):
        raise ConfigError(
            f"{SHARED!r} with strategy {job.strategy}",
            path=("job", "privacy", "noise"),
            expected="a job in which nothing is made of single updates",
            got=reader,
            hint=f"With noise = {LOCAL!r} every update is private by itself.",
        )
    return strategy


def check_secure(job: Job, strategy: Strategy) -> Strategy:
    """Check that a job with secure aggregation needs no more than sums of masked updates. Raises `ConfigError`, which
    says what does.

    Returns:
        The strategy.
    """
    if not job.secure_aggregation:
        return strategy
    reader = _single_update_reader(job, strategy, (PLAIN, "int8"))
    if not reader and (job.compression_of or job.compression_down not in (AUTO, PLAIN)):
        reader = "compression_of or compression_down, by which boards differ"
    if not reader and (job.recipe.mask != "none" or job.recipe.report_squares):
        reader = "a recipe with element masks or squared gradients, which boards have of their own"
    if reader:
        raise ConfigError(
            f"with strategy {job.strategy}",
            path=("job", "secure_aggregation"),
            expected="a job in which nothing is made of single updates",
            got=reader,
            hint="fedavg, and heterofl with label_rows = false, are some that go with it; compression may be int8.",
        )
    return strategy


def _single_update_reader(job: Job, strategy: Strategy, allowed: Collection[str]) -> str:
    """What of a job reads single updates, or more than their sum; empty if nothing does.

    Args:
        allowed: Codecs that don't.
    """
    # AUTO is the strategy's own codec, which is checked with the strategy.
    codecs = {job.compression, *job.compression_of.values()} - {AUTO, *allowed}
    readers = {
        "a composition of your own, which may read anything": ":" in job.strategy,
        "a strategy that uses single updates": strategy.inputs != "sum",
        "a schedule on which updates are released one by one": strategy.schedule is not None
        and strategy.schedule.asynchronous,
        "a robust mean, which compares single updates": "robust" in job.options,
        "an aggregator that is no mean of all": type(strategy.aggregator) is not Mean,
        "an option by which only what an update has changed counts": isinstance(strategy.aggregator, Mean)
        and strategy.aggregator.only_changed != "",
        "a ranking by how single updates moved": strategy.observes_movement,
        f"compression {', '.join(sorted(codecs))}, which rounds single updates": bool(codecs),
        "masks of single elements, which only some boards hold": strategy.uses_masks,
        "rounds of exploration": strategy.exploration_rounds > 0,
        "updates that are kept for the next rounds": strategy.keeps_past,
    }
    return next((reader for reader, applies in readers.items() if applies), "")
