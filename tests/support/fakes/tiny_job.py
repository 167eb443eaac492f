"""A job that is as small as can be, for tests of rounds in which no weight matters."""

from dataclasses import replace

from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.model.architecture import (
    Activation,
    Architecture,
    Axis,
    ChannelGroup,
    LayerRow,
    Segment,
    TensorKind,
    TensorSpec,
)
from fedprune.strategies.aggregators import DeltaMean
from fedprune.strategies.methods.plain import plain_strategy
from fedprune.strategies.strategy import Strategy

CHANNELS = Axis((Segment(0, 0, 8),))
ARCHITECTURE = Architecture(
    "toy",
    (ChannelGroup("g0", 8),),
    (
        TensorSpec("w", TensorKind.WEIGHT, (CHANNELS, Axis.fixed(4))),
        TensorSpec("head", TensorKind.WEIGHT, (Axis.fixed(3), CHANNELS)),
    ),
    (LayerRow("w", "Gemm", "w", 1), LayerRow("head", "Gemm", "head", 1)),
    (Activation("h", CHANNELS, 1, True),),
    (4,),
    (3,),
)
WIDE_A, WIDE_B = Axis((Segment(0, 0, 600),)), Axis((Segment(1, 0, 400),))
WIDE = Architecture(
    "a megabyte of weights",
    (ChannelGroup("a", 600), ChannelGroup("b", 400)),
    (
        TensorSpec("first.weight", TensorKind.WEIGHT, (WIDE_A, Axis.fixed(3))),
        TensorSpec("second.weight", TensorKind.WEIGHT, (WIDE_B, WIDE_A)),
        TensorSpec("head.weight", TensorKind.WEIGHT, (Axis.fixed(3), WIDE_B)),
    ),
    tuple(LayerRow(n, "Gemm", f"{n}.weight", 1) for n in ("first", "second", "head")),
    (),
    (3,),
    (3,),
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
