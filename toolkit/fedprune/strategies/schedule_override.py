"""Another schedule than a strategy's own: rounds in step, rounds that close by the clock, or no rounds at all.

`[job.schedule]` says `kind`, and any key of `fedprune.jobs.schedule.Schedule` that goes with it:

| kind | when the model moves | by default |
|---|---|---|
| `sync` | when all that were asked are in, or the deadline has passed | |
| `semi-async` | at the end of a window of time, by what came in it | `window_s` is a tenth of the deadline |
| `async` | whenever so many updates are in | `arrivals` is half of the job's `devices` |

Updates of earlier models count for less the staler they are, (k + 1)^-½ unless `staleness` says otherwise, and count as
moves away from what their device was sent, as in FedBuff (Nguyen et al. 2022).
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.averaging import DeltaMean, Mean
from fedprune.strategies.strategy import Strategy

KINDS = ("sync", "semi-async", "async")

_EITHER = ("concurrent", "rate", "mixing", "keep", "staleness", "max_staleness", "score_every", "evaluate_every")
_OF = {"semi-async": ("window_s", "least", "extension_s"), "async": ("arrivals",)}
"""Keys of `Schedule` that either kind has, and those of each."""

_IN_STEP = ("over_selection", "fairness", "in_flight", "pace")
"""Settings of the job that are about rounds in step."""


def scheduled(strategy: Strategy, job: Job) -> Strategy:
    """A strategy on the schedule that the job asks for, or on its own.

    Raises:
        ConfigError: The schedule's settings are wrong, the strategy can't be moved to it, or the job has settings that
            mean nothing on it.
    """
    moved = _moved(strategy, job) if job.schedule else strategy
    if moved.schedule is not None and moved.schedule.asynchronous:
        for name in _IN_STEP:
            if getattr(job, name):
                raise ConfigError(
                    f"job: {name}",
                    expected="0 in an asynchronous job, whose devices never wait for one another",
                    got=getattr(job, name),
                    hint="The schedule's concurrent says how many work at a time." if name == "in_flight" else "",
                )
    share = job.participation if moved.schedule is None else moved.schedule.participation or job.participation
    if job.over_selection and share == 1:
        raise ConfigError(
            "job: over_selection",
            expected="a participation below 1, which leaves somebody to ask beyond those that a round needs",
            got=f"{job.over_selection:g}, and everybody is asked",
        )
    return moved


def _moved(strategy: Strategy, job: Job) -> Strategy:
    body: dict[str, Any] = dict(job.schedule)
    # Before the kind, which may be the key that is misspelt.
    validation.only(("kind", *_EITHER, *(key for keys in _OF.values() for key in keys)), body, "job: schedule")
    if "kind" not in body:
        raise ConfigError("job: schedule: kind", expected=" or ".join(KINDS), got="nothing")
    kind = body.pop("kind")
    validation.word("job: schedule: kind", kind, KINDS)
    if kind == "sync":
        if body:
            raise ConfigError(
                "job: schedule: kind 'sync'",
                expected="no other key: rounds in step go by the job's own settings",
                got=", ".join(sorted(body)),
            )
        if strategy.schedule is None or not strategy.schedule.asynchronous:
            return strategy
    aggregator = strategy.aggregator
    own = type(strategy).close is not Strategy.close
    plain = type(aggregator) in (Mean, DeltaMean) and not own and not strategy.explores
    # Who averages models on a schedule of its own does it by that schedule's arithmetic.
    if not plain or (strategy.schedule is not None and type(aggregator) is Mean):
        raise ConfigError(
            f"job: schedule: strategy {strategy.name} keeps its own",
            expected="a strategy that averages updates, round by round or as moves",
            got=f"kind {kind!r}",
            hint="Leave [job.schedule] out; the strategy's own options are on its page in docs/strategies.",
        )
    if kind == "sync":
        return replace(strategy, schedule=None)
    validation.only((*_EITHER, *_OF[kind]), body, f"job: schedule: kind {kind!r}")
    defaults: dict[str, dict[str, Any]] = {
        "semi-async": {"window_s": job.deadline_s / 10},
        "async": {"arrivals": max(1, job.devices // 2)},
    }
    body = {"mixing": "damped", "staleness": {"decay": "polynomial"}, **defaults[kind], **body}
    try:
        schedule = Schedule.from_dict({**body, "kind": "asynchronous"})
    except ConfigError as error:
        raise ConfigError(f"job: {error.what}", expected=error.expected, got=error.got, hint=error.hint) from error
    moves = DeltaMean(**{f.name: getattr(aggregator, f.name) for f in fields(Mean)})
    return replace(strategy, schedule=schedule, aggregator=moves)
