"""FIARSE (Wu et al., NeurIPS 2024): submodels keep the largest weights, and training shapes their sizes to fit.

`docs/strategies/fiarse.md` has equations, readings and options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Allocator, Fixed, Tiers
from fedprune.strategies.element_masks import MaskedElements
from fedprune.strategies.importance.element_ranking import magnitudes, prunable
from fedprune.strategies.importance.scoring import order_scores, rank_channels
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Ranking, Scene, Turn

NAME = "fiarse"


@dataclass(frozen=True)
class FiarseOptions:
    """Options of `fiarse`, which `docs/strategies/fiarse.md` explains."""

    densities: tuple[float, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class Fiarse(MaskedElements):
    """Ranks elements by |w|; channels keep their own order."""

    def rank(self, scene: Scene) -> Ranking:
        return Ranking(
            rank_channels(order_scores(scene.architecture)), magnitudes(scene.model, prunable(scene.architecture))
        )

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        return replace(recipe, mask="threshold")


def fiarse(job: Job) -> Strategy:
    options = read_options(job, FiarseOptions)
    allocator: Allocator = Tiers(options.densities or (1.0, 1 / 4, 1 / 16, 1 / 64), masks_elements=True)
    if job.density and not options.densities:
        allocator = Fixed(job.density, masks_elements=True)
    return Fiarse(
        NAME,
        # The paper divides by the number of devices that changed an element, whatever their samples
        # (docs/strategies/fiarse.md, step 4).
        aggregator=Mean(weighting="uniform", only_changed="elements"),
        inputs="updates",
        allocator=allocator,
    )
