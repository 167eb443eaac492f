"""Puts a strategy on the schedule that its job asks for: rounds in step, time windows, or update by update."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.strategy import Strategy

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
    # A strategy that has a schedule of its own and averages whole models (`Mean`) needs that schedule's arithmetic.
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
    schedule = Schedule.from_dict({**schedule_table, "kind": "asynchronous"})
    delta_mean = DeltaMean(**{f.name: getattr(aggregator, f.name) for f in fields(Mean)})
    return replace(strategy, schedule=schedule, aggregator=delta_mean)
