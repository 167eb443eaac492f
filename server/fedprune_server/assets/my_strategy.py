"""A strategy of your own, chosen in `fleet.toml`: [job] strategy = "my_strategy:energy", [job.options] momentum = 0.5.

The server calls the methods below at fixed moments of each round. Their arguments:

    scene    the round as a strategy sees it: architecture, global model, round number, and `memory`
    fold     the running sum of the updates that boards have sent in this round
    reports  returns these updates one by one
    turn     one device's part in the round: the device's name, the round's number, its widths
"""

from dataclasses import dataclass, replace

import numpy as np

from fedprune import Ranking, Strategy, read_options
from fedprune.model.architecture import TensorKind
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.importance.scoring import channel_sums, rank_channels


@dataclass(frozen=True)
class Energy(Strategy):
    """Ranks channels by the energy (sum of squares) of the weights that make them, averaged over the rounds."""

    lr_decay: float = 0.98

    def rank(self, scene):  # once at a round's beginning: boards get the first channels of this ranking
        return Ranking(rank_channels(self.average(scene)))

    def learn(self, scene, fold, reports):  # when all updates have arrived: `scene.memory` of the next round
        return {"energy": dict(zip(self.names(scene), self.average(scene), strict=True))}

    def close(self, fold, scene, rate, reports):  # then: the next global model; smaller steps in the first three rounds
        return super().close(fold, scene, rate * min(1, scene.round / 4), reports)

    def recipe(self, recipe, turn):  # before each offer: how the device trains
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
