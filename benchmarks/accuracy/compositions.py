"""Strategies that only experiments need: single ingredients, put together from roles."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.aggregation.fold import Rule
from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Tiers
from fedprune.strategies.objectives import AsJob
from fedprune.strategies.options import read_options
from fedprune.strategies.scorers import ByName
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class Options:
    """Settings of `slices`.

    Attributes:
        densities: The tiers.
        scorer: Ranks channels.
        warmup_rounds: Rounds of random ranks before.
        rule: `coverage`, `fill` or `zero`.
        server_momentum: Of the global model's moves.
        weighting: `samples` or `uniform`.
        lr_decay: Of the learning rate, per round.
    """

    densities: tuple[float, ...] = (1.0,)
    scorer: str = "ordered"
    warmup_rounds: int = 0
    rule: Rule = "coverage"
    server_momentum: float = 0.0
    weighting: str = "samples"
    lr_decay: float = 1.0


def slices(job: Job) -> Strategy:
    """Submodels of ranked channels and a mean of them, with nothing else: what HeteroFL is without its extras."""
    options = read_options(job, Options)
    return Strategy(
        "slices",
        scorer=ByName(options.scorer, options.warmup_rounds),
        aggregator=Mean(options.rule, options.server_momentum, options.weighting),
        objective=AsJob(lr_decay=options.lr_decay),
        inputs="sum",
        allocator=Tiers(options.densities),
    )
