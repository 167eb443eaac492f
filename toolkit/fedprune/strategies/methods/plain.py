"""The strategy that a job's own keys describe: ranked slices, a mean, and nothing else."""

from __future__ import annotations

from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.strategy import Strategy


def plain_strategy(job: Job) -> Strategy:
    """Compose what the job's `scorer`, `warmup_rounds`, `rule` and `server_momentum` say."""
    return RankedChannels(
        "plain",
        scorer=job.scorer,
        warmup_rounds=job.warmup_rounds,
        aggregator=Mean(rule=job.rule, server_momentum=job.server_momentum),
        inputs="sum",
    )
