"""Strategies whose extractors choose channels of their own, such as `support.fakes.picking_strategies:others`."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.core.rng import keyed
from fedprune.jobs.job import Job
from fedprune.model.selection import Selection
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Fixed
from fedprune.strategies.element_importance import Importance
from fedprune.strategies.extractors import Selected
from fedprune.strategies.methods.autoflip import Emergent
from fedprune.strategies.methods.fedper import OwnHistory
from fedprune.strategies.objectives import AsJob
from fedprune.strategies.roles import Cut, Submodel
from fedprune.strategies.scorers import ByName
from fedprune.strategies.strategy import Strategy


@dataclass(frozen=True)
class Others(Selected):
    """Channels by chance, whatever the ranking says."""

    def extract(self, cut: Cut) -> Submodel:
        """As many as the cut has."""
        scene, turn = cut.scene, cut.turn
        chance = keyed(scene.seed, scene.round, turn.device, "others")
        ranks = [chance.permutation(n) for n in scene.architecture.sizes]
        selection = Selection.of(scene.architecture, turn.widths, ranks)
        return Submodel(selection, selection.gather(scene.model))


def others(job: Job) -> Strategy:
    """Channels by chance, and a memory of the last ones."""
    parts = (ByName("magnitude"), Others(), Mean(rule="fill"), OwnHistory(0.5), AsJob())
    return Strategy("others", *parts, inputs="updates", keeps_past=True)


def emergent(job: Job) -> Strategy:
    """Channels that an extractor's masks leave, out of a ranking that knows nothing of those masks."""
    parts = (Importance("size", 50, 0.0), Emergent(False, 0.3), Mean(rule="fill"), OwnHistory(0.5), AsJob())
    return Strategy("emergent", *parts, inputs="updates", allocator=Fixed(0.3, elements=True), keeps_past=True)
