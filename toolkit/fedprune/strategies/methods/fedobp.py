"""FedOBP (arXiv 2604.16574): elements in which a device's own model is far from the global one stay its own.

The server, which gets every device's whole model anyway, compares it with the global model, and sends the device the
global model with the device's own elements in it (the cloud-edge form). `docs/strategies/fedobp.md` has equations,
readings and options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors, mesh
from fedprune.model.trainable import head_axes
from fedprune.strategies.aggregators import same_coordinates
from fedprune.strategies.allocation import dealt
from fedprune.strategies.importance.element_ranking import quantile
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Cut, Memories, Report, Scene, Submodel

NAME = "fedobp"

INITIAL = "initial"
"""Memory: w_0, which a device that hands in its first update has as its own model."""

_SCORES = "scores/"
"""Memory: per device the moving average of its scores, float32, global coordinates; NaN where nothing was compared."""

Score = Literal["sq_diff", "diff_times_local"]
Normalisation = Literal["none", "layer", "global"]
Scope = Literal["all", "classifier"]

Float64s = npt.NDArray[np.float64]
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Options:
    """Options of `fedobp`, which `docs/strategies/fedobp.md` explains."""

    q: float = bounded(0.9999, 0, 1)
    score: Score = "sq_diff"
    average: float = bounded(0.0, 0, 1, below=True)
    normalisation: Normalisation = "none"
    scope: Scope = "all"
    densities: tuple[float, ...] = bounded((), 0, 1, above=True)


class _Compared(NamedTuple):
    """A tensor of a device's model and of the global one, in the coordinates of the submodel that it is to get.

    Attributes:
        local: The device's own θ_i.
        score: Per element.
        known: Where there is something to compare: what the device has trained before, and is to get again.
    """

    local: npt.NDArray[np.float32]
    score: Float64s
    known: Bits


@dataclass(frozen=True)
class FedObp(Strategy):
    """Keeps a device's own elements where they are far from the global model.

    They are protected from being overwritten, not kept from the others: all of an update enters the sums.
    """

    options: Options = field(default_factory=Options)

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        if self.options.scope == "classifier":
            head_axes(architecture, ("job", "options", "scope"))
        return model

    def extract(self, cut: Cut) -> Submodel:
        """A slice of the global model, with θ_i^{t−1} where its score is above the quantile."""
        submodel = super().extract(cut)
        if self.options.q == 1 or not cut.turn.device:
            return submodel
        compared = self.scores(cut, submodel)
        values = {n: self._normalised(c.score[c.known]) for n, c in compared.items() if c.known.any()}
        if not values:
            return submodel
        if self.options.normalisation == "global":
            low, high = min(float(v.min()) for v in values.values()), max(float(v.max()) for v in values.values())
            values = {n: (v - low) / (high - low) if high > low else v - low for n, v in values.items()}
        limit = quantile(values.values(), self.options.q)
        tensors = dict(submodel.tensors)
        for name, value in values.items():
            one = compared[name]
            own = one.known.copy()
            own[one.known] = value > limit
            if own.any():
                tensors[name] = np.where(own, one.local, tensors[name])
        return Submodel(submodel.selection, tensors, submodel.mask)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        """The initial model, in the first round; moving averages of scores, where they are asked for."""
        out: Memories = {}
        if INITIAL not in scene.memory:
            out[INITIAL] = {t.name: scene.model[t.name] for t in scene.architecture.tensors}
        if self.options.average:
            out |= {_SCORES + report.cut.turn.device: self._averages(report) for report in reports()}
        return out

    def scores(self, cut: Cut, submodel: Submodel) -> dict[str, _Compared]:
        """Scores of what may stay the device's own, averaged over its visits if so asked."""
        architecture, options = cut.scene.architecture, self.options
        # Batch-norm statistics are always the global model's.
        trained = [t.name for t in architecture.trainable]
        names = list(head_axes(architecture)) if options.scope == "classifier" else trained
        before = cut.scene.memory.get(_SCORES + cut.turn.device) if options.average else None
        out = {}
        for name in names:
            local, known = _own(cut, submodel, name)
            far = local.astype(np.float64) - submodel.tensors[name]
            score = far * far if options.score == "sq_diff" else np.abs(far * local)
            if before is not None:
                last = before[name][mesh(submodel.selection.maps(name))]
                score = np.where(np.isnan(last), score, (1 - options.average) * score + options.average * last)
            out[name] = _Compared(local, score, known)
        return out

    def _normalised(self, score: Float64s) -> Float64s:
        if self.options.normalisation != "layer":
            return score
        low, high = float(score.min()), float(score.max())
        return (score - low) / (high - low) if high > low else score - low

    def _averages(self, report: Report) -> dict[str, npt.NDArray[np.float32]]:
        cut, selection = report.cut, report.trained.selection
        plain = Submodel(selection, selection.gather(cut.scene.model), report.trained.mask)
        before = cut.scene.memory.get(_SCORES + cut.turn.device)
        out = {}
        for name, one in self.scores(cut, plain).items():
            known = None if before is None else before[name]
            full = (
                np.full(cut.scene.architecture.by_name[name].shape, np.nan, np.float32)
                if known is None
                else np.array(known)
            )
            at = mesh(selection.maps(name))
            full[at] = np.where(one.known, one.score, full[at])
            out[name] = full
        return out


def fedobp(job: Job) -> Strategy:
    options = read_options(job, Options)
    return FedObp(
        NAME,
        options=options,
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
        if cut.past.mask is not None and name in cut.past.mask.active:
            known = cut.past.mask.active[name].copy()
    else:
        past = cut.past
        full = np.zeros(cut.scene.architecture.by_name[name].shape, np.float32)
        held = np.zeros(full.shape, np.bool_)
        at = mesh(past.selection.maps(name))
        full[at] = past.tensors[name]
        held[at] = True if past.mask is None else past.mask.active.get(name, True)
        into = mesh(selection.maps(name))
        local, known = full[into], held[into]
    if submodel.mask is not None and name in submodel.mask.active:
        known = known & submodel.mask.active[name]
    return local, known
