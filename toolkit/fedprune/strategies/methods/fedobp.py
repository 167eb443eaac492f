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
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.importance.element_ranking import quantile
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, NewMemory, Scene, Submodel, UpdateReport

NAME = "fedobp"

# Memory: w_0, which a device that hands in its first update has as its own model.
INITIAL = "initial"

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FedObpOptions:
    """Options of `fedobp`, which `docs/strategies/fedobp.md` explains."""

    q: float = bounded(0.9999, 0, 1)
    densities: tuple[float, ...] = bounded((), 0, 1, above=True)


@dataclass(frozen=True)
class FedObp(Strategy):
    """Keep a device's own elements where they are far from the global model. They are protected from being overwritten,
    not kept from the others: all of an update enters the sums."""

    q: float = FedObpOptions.q

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with θ_i^{t−1} where its score is above the quantile."""
        submodel = super().extract(cut)
        # Nothing is above the largest score; a submodel that is made for no device in particular has no own elements.
        if self.q == 1 or not cut.turn.device:
            return submodel
        # Batch-norm statistics are always the global model's.
        names = [t.name for t in cut.scene.architecture.trainable]
        own_tensors = {name: _own_tensor(cut, submodel, name) for name in names}
        scores = {
            name: np.square(own_values[is_own].astype(np.float64) - submodel.tensors[name][is_own])
            for name, (own_values, is_own) in own_tensors.items()
        }
        if not any(score.size for score in scores.values()):
            return submodel
        # One quantile over all tensors: a tensor in which the device agrees with the fleet keeps nothing of its own.
        limit = quantile(scores.values(), self.q)
        tensors = dict(submodel.tensors)
        for name, (own_values, is_own) in own_tensors.items():
            is_protected = is_own.copy()
            is_protected[is_own] = scores[name] > limit
            if is_protected.any():
                tensors[name] = np.where(is_protected, own_values, tensors[name])
        return Submodel(submodel.selection, tensors, submodel.mask)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        """The initial model, in the first round."""
        if INITIAL in scene.memory:
            return {}
        return {INITIAL: {t.name: scene.model[t.name] for t in scene.architecture.tensors}}


def fedobp(job: Job) -> Strategy:
    options = read_options(job, FedObpOptions)
    return FedObp(
        NAME, q=options.q, inputs="updates", allocator=density_allocator(job, options.densities), keeps_past=True
    )


def _own_tensor(cut: Cut, submodel: Submodel, name: str) -> tuple[npt.NDArray[np.float32], Bits]:
    """A device's own tensor in a submodel's coordinates, and a mask of the elements that it has. The tensor is that of
    its last update or, before its first, of the initial model."""
    selection, sent_values = submodel.selection, submodel.tensors[name]
    if cut.past is None:
        initial: Tensors = dict(cut.scene.memory.get(INITIAL, cut.scene.model))
        own_values, is_own = initial[name][mesh(selection.maps(name))], np.ones(sent_values.shape, np.bool_)
    elif same_coordinates(cut.past.selection, selection):
        own_values, is_own = cut.past.tensors[name], np.ones(sent_values.shape, np.bool_)
        if name in cut.past.mask:
            is_own = cut.past.mask[name].copy()
    else:
        past = cut.past
        # Widths or ranks have changed since: by way of the whole model, elements find their new positions.
        past_values = np.zeros(cut.scene.architecture.by_name[name].shape, np.float32)
        past_coverage = np.zeros(past_values.shape, np.bool_)
        past_indices = mesh(past.selection.maps(name))
        past_values[past_indices] = past.tensors[name]
        past_coverage[past_indices] = past.mask.get(name, True)
        sent_indices = mesh(selection.maps(name))
        own_values, is_own = past_values[sent_indices], past_coverage[sent_indices]
    # A device can't keep elements that it isn't sent.
    if name in submodel.mask:
        is_own = is_own & submodel.mask[name]
    return own_values, is_own
