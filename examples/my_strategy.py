"""A strategy of one's own, in `fleet.toml`: [job] strategy = "my_strategy:energy" and [job.options] momentum = 0.5."""

from dataclasses import dataclass

import numpy as np

from fedprune.architecture import TensorKind
from fedprune.scoring import channel_sums, ranks
from fedprune.strategies import Strategy, read_options
from fedprune.strategies.extraction import Nobody, Selected
from fedprune.strategies.means import Mean
from fedprune.strategies.objectives import AsJob
from fedprune.strategies.roles import Ranking


class Energy:
    """Ranks channels by the energy of the weights that make them."""

    observes = False  # it needs to know nothing of how weights moved

    def rank(self, scene):
        energy = channel_sums(scene.architecture, lambda name: np.square(scene.model[name]), (TensorKind.WEIGHT,))
        return Ranking(ranks(energy))

    def learn(self, scene, fold, reports):
        return {}  # and remembers nothing


@dataclass(frozen=True)
class Options:
    momentum: float = 0.5
    lr_decay: float = 0.98


def energy(job):
    """Compose the strategy of a job: one role of our own, and five that are there."""
    options = read_options(job, Options)
    mean = Mean(rule="fill", server_momentum=options.momentum)
    objective = AsJob({"logit_adjustment": True}, lr_decay=options.lr_decay)
    return Strategy("energy", Energy(), Selected(), mean, Nobody(), objective)
