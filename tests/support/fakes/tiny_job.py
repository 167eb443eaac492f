"""A job that is as small as can be, for tests of rounds in which no weight matters."""

from dataclasses import replace

from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.aggregators import DeltaMean
from fedprune.strategies.methods.plain import plain_strategy
from fedprune.strategies.strategy import Strategy
from support.nets.written_nets import written_net

ARCHITECTURE = written_net({"g0": 8}, {"w": ("g0", 4), "head": (3, "g0")}, (4,), (3,), activations={"h": ("g0", 1)})
WIDE = written_net(
    {"a": 600, "b": 400},
    {"first.weight": ("a", 3), "second.weight": ("b", "a"), "head.weight": (3, "b")},
    (3,),
    (3,),
    name="a megabyte of weights",
)
JOB = Job(name="toy", rounds=3, devices=3, density=0.5, deadline_s=100, ignores_plans=True)
NAMES = ("a", "b", "c")


def scheduled(job: Job) -> Strategy:
    """The plain strategy on the schedule of `options={"schedule": {...}}`."""
    options = dict(job.options)
    schedule = Schedule.from_dict(options.pop("schedule"))
    aggregator = DeltaMean(weighting=options.get("weighting", "samples"))
    return replace(plain_strategy(replace(job, strategy="plain", options={})), schedule=schedule, aggregator=aggregator)


def measuring(job: Job) -> Strategy:
    """The same, as if it used what boards measure."""
    return replace(scheduled(job), inputs="measurements")
