"""Strategies that choose channels of their own, such as `support.fakes.picking_strategies:others`."""

from dataclasses import dataclass, field

from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.model.selection import Selection
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Fixed
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.methods.autoflip import without_empty_channels
from fedprune.strategies.methods.history import fuse_history
from fedprune.strategies.methods.pr_fl import Importance
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Ranking, Scene, Submodel


@dataclass(frozen=True)
class Others(RankedChannels):
    """Channels by chance, whatever the ranking says, fused with the device's last ones."""

    def extract(self, cut: Cut) -> Submodel:
        scene, turn = cut.scene, cut.turn
        chance = keyed_generator(scene.seed, scene.round, turn.device, "others")
        ranks = [chance.permutation(n) for n in scene.architecture.sizes]
        selection = Selection.of(scene.architecture, turn.widths, ranks)
        return fuse_history(cut, Submodel(selection, selection.gather(scene.model)), 0.5)


@dataclass(frozen=True)
class Emergent(Strategy):
    """Channels that masks leave, out of a ranking that knows nothing of those masks."""

    importance: Importance = field(default_factory=lambda: Importance(50, 0.0))

    def rank(self, scene: Scene) -> Ranking:
        return self.importance.rank(scene)

    def extract(self, cut: Cut) -> Submodel:
        return fuse_history(cut, without_empty_channels(cut, 0.3), 0.5)


class Doubled(Strategy):
    """Sends twice the weights."""

    def extract(self, cut: Cut) -> Submodel:
        sent = super().extract(cut)
        return Submodel(sent.selection, {n: 2 * v for n, v in sent.tensors.items()})


def doubled(job: Job) -> Strategy:
    return Doubled(inputs="updates")


def others(job: Job) -> Strategy:
    return Others("others", scorer="magnitude", aggregator=Mean(rule="fill"), inputs="updates", keeps_past=True)


def emergent(job: Job) -> Strategy:
    allocator = Fixed(0.3, masks_elements=True)
    return Emergent("emergent", aggregator=Mean(rule="fill"), inputs="updates", allocator=allocator, keeps_past=True)
