"""FedOBP (arXiv 2604.16574): elements in which a device's own model is far from the global one stay its own.

The server, which gets every device's whole model anyway, compares it with the global model, and sends the device the
global model with the device's own elements in it (the cloud-edge form). `docs/strategies/fedobp.md` has equations,
readings and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors, mesh
from fedprune.strategies.aggregators import same_coordinates
from fedprune.strategies.allocation import dealt
from fedprune.strategies.importance.element_ranking import quantile
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Memories, Report, Scene, Submodel

NAME = "fedobp"

INITIAL = "initial"
"""Memory: w_0, which a device that hands in its first update has as its own model."""

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Options:
    """Options of `fedobp`, which `docs/strategies/fedobp.md` explains."""

    q: float = bounded(0.9999, 0, 1)
    densities: tuple[float, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class FedObp(Strategy):
    """Keeps a device's own elements where they are far from the global model.

    They are protected from being overwritten, not kept from the others: all of an update enters the sums.
    """

    q: float = Options.q

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with θ_i^{t−1} where its score is above the quantile."""
        submodel = super().extract(cut)
        if self.q == 1 or not cut.turn.device:
            return submodel
        # Batch-norm statistics are always the global model's.
        names = [t.name for t in cut.scene.architecture.trainable]
        own = {name: _own(cut, submodel, name) for name in names}
        scores = {
            name: np.square(local[known].astype(np.float64) - submodel.tensors[name][known])
            for name, (local, known) in own.items()
        }
        if not any(score.size for score in scores.values()):
            return submodel
        limit = quantile(scores.values(), self.q)
        tensors = dict(submodel.tensors)
        for name, (local, known) in own.items():
            kept = known.copy()
            kept[known] = scores[name] > limit
            if kept.any():
                tensors[name] = np.where(kept, local, tensors[name])
        return Submodel(submodel.selection, tensors, submodel.mask)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        """The initial model, in the first round."""
        if INITIAL in scene.memory:
            return {}
        return {INITIAL: {t.name: scene.model[t.name] for t in scene.architecture.tensors}}


def fedobp(job: Job) -> Strategy:
    options = read_options(job, Options)
    return FedObp(
        NAME,
        q=options.q,
        inputs="updates",
        allocator=dealt(job, options.densities),
        keeps_past=True,
    )


def _own(cut: Cut, submodel: Submodel, name: str) -> tuple[npt.NDArray[np.float32], Bits]:
    """A device's own tensor in a submodel's coordinates, and which of its elements there are.

    That is its last update or, before its first, the initial model.
    """
    selection, now = submodel.selection, submodel.tensors[name]
    if cut.past is None:
        initial: Tensors = dict(cut.scene.memory.get(INITIAL, cut.scene.model))
        local, known = initial[name][mesh(selection.maps(name))], np.ones(now.shape, np.bool_)
    elif same_coordinates(cut.past.selection, selection):
        local, known = cut.past.tensors[name], np.ones(now.shape, np.bool_)
        if name in cut.past.mask:
            known = cut.past.mask[name].copy()
    else:
        past = cut.past
        full = np.zeros(cut.scene.architecture.by_name[name].shape, np.float32)
        held = np.zeros(full.shape, np.bool_)
        at = mesh(past.selection.maps(name))
        full[at] = past.tensors[name]
        held[at] = past.mask.get(name, True)
        into = mesh(selection.maps(name))
        local, known = full[into], held[into]
    if name in submodel.mask:
        known = known & submodel.mask[name]
    return local, known
