"""Strategies that only experiments need."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Tiers
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class SliceOptions:
    """Settings of `slices`.

    Attributes:
        densities: The tiers.
    """

    densities: tuple[float, ...] = (1.0,)


def slices(job: Job) -> Strategy:
    """Submodels of ranked channels and a mean of them, with nothing else: what HeteroFL is without its extras."""
    allocator = Tiers(read_options(job, SliceOptions).densities)
    return RankedChannels(
        "slices", scorer="ordered", aggregator=Mean("coverage", 0.0, "samples"), inputs="sum", allocator=allocator
    )
