"""Strategies that only experiments need."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedprune.aggregation.fold import Rule
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Tiers
from fedprune.strategies.channel_ranking import Ranked
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn


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


@dataclass(frozen=True)
class Slices(Ranked):
    """Submodels of ranked channels, and a learning rate that decays."""

    lr_decay: float = 1.0

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, lr=recipe.lr * self.lr_decay ** (turn.round - 1))


def slices(job: Job) -> Strategy:
    """Submodels of ranked channels and a mean of them, with nothing else: what HeteroFL is without its extras."""
    options = read_options(job, Options)
    return Slices(
        "slices",
        scorer=options.scorer,
        warmup_rounds=options.warmup_rounds,
        lr_decay=options.lr_decay,
        aggregator=Mean(options.rule, options.server_momentum, options.weighting),
        inputs="sum",
        allocator=Tiers(options.densities),
    )
