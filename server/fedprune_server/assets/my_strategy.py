"""A strategy of one's own, in `fleet.toml`: [job] strategy = "my_strategy:energy" and [job.options] momentum = 0.5."""

from dataclasses import dataclass, replace

import numpy as np

from fedprune import Ranking, Strategy, read_options
from fedprune.model.architecture import TensorKind
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.importance.scoring import channel_sums, rank_channels


@dataclass(frozen=True)
class Energy(Strategy):
    """Ranks channels by the energy of the weights that make them, averaged over the rounds."""

    lr_decay: float = 0.98

    def rank(self, scene):
        return Ranking(rank_channels(self.average(scene)))

    def learn(self, scene, fold, reports):
        return {"energy": dict(zip(self.names(scene), self.average(scene), strict=True))}  # the next round's memory

    def close(self, fold, scene, rate, reports):  # the first three rounds go only a part of the way
        return super().close(fold, scene, rate * min(1, scene.round / 4), reports)

    def recipe(self, recipe, turn):
        return replace(recipe, logit_adjustment=True, lr=recipe.lr * self.lr_decay ** (turn.round - 1))

    def average(self, scene):
        now = channel_sums(scene.architecture, lambda name: np.square(scene.model[name]), (TensorKind.WEIGHT,))
        before, names = scene.memory.get("energy", {}), self.names(scene)
        if set(before) != set(names):  # the first round
            return now
        return tuple((before[name] + e) / 2 for name, e in zip(names, now, strict=True))

    def names(self, scene):  # a later version of the compiler may find other groups in the same model
        return [f"{scene.architecture.digest}/{group.name}" for group in scene.architecture.groups]


@dataclass(frozen=True)
class Options:
    momentum: float = 0.5
    lr_decay: float = 0.98


def energy(job):
    """The strategy of a job: four methods of our own, and a shipped aggregator."""
    options = read_options(job, Options)
    aggregator = Mean(rule="fill", server_momentum=options.momentum)
    return Energy(lr_decay=options.lr_decay, aggregator=aggregator, inputs="sum")
