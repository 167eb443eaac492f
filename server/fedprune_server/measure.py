"""What a simulation measures of its global model at the end of a round, for experiments alone.

Nothing of it reaches the coordinator, so nothing that decides (an allocator, a schedule, early stopping) can see it: a
test set may be used here without leaking into the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step
from fedprune.architecture import Architecture, widths_at
from fedprune.coordination import commands as do
from fedprune.errors import ConfigError
from fedprune.job import Job
from fedprune.recipe import Features
from fedprune.selection import Selection, Tensors
from fedprune.session import Session
from fedprune.strategies import compose
from fedprune.strategies.roles import Cut, Memory, Scene, Submodel, Turn
from fedprune_device.labels import targets
from fedprune_device.losses import data_loss, hits
from fedprune_export.cut import at_widths
from fedprune_export.graph import Port
from fedprune_export.imported import Model
from fedprune_server.archive import Archive
from fedprune_server.calibration import Calibration

Array = npt.NDArray[Any]
Samples = tuple[Array, Array]
"""Inputs and labels, as `LocalData` has them."""

_BATCH = 256


@dataclass(frozen=True)
class Moment:
    """A round that has just closed, as a measurement sees it.

    Attributes:
        job: The job's settings.
        imported: The imported model; its weights are those that the job began with.
        round: The round, from 1.
        clock: Virtual seconds since the beginning.
        before: The clock when the round before ended; 0 in the first.
        parts: The devices' parts whose updates made the new model.
        basis: What the round's submodels were cut from; its `model` is the one before the round.
        digest: Digest of the new global model.
        archive: Reads models, rankings and memories.
    """

    job: Job
    imported: Model
    round: int
    clock: float
    before: float
    parts: tuple[do.Part, ...]
    basis: do.Basis
    digest: str
    archive: Archive

    @property
    def architecture(self) -> Architecture:
        """The model's architecture."""
        return self.imported.architecture

    @cached_property
    def model(self) -> Tensors:
        """The new global model."""
        return self.archive.model(self.digest)

    @cached_property
    def ranking(self) -> Selection:
        """The round's ranking of channels, at full width."""
        return self.archive.selection(self.basis.ranking, self.architecture.sizes)

    @cached_property
    def memory(self) -> Memory:
        """What the job remembered when the round began."""
        return self.archive.memory(self.basis.memory)

    def submodel(self, density: float) -> Submodel:
        """What the job's strategy cuts out of the new model for a device of this density that was never there.

        It keeps the same share of each group; where the round's devices keep all channels, and their density says how
        many elements, so does it.

        Args:
            density: Share of the model, above 0 and at most 1.
        """
        sizes = self.architecture.sizes
        elements = any(p.density < 1 and p.widths == sizes for p in self.parts)
        widths = sizes if elements else widths_at(self.architecture, density)
        scene = Scene(
            self.architecture, self.job.seed, self.round, self.model, self.memory, self.job.recipe, participants=()
        )
        turn = Turn(self.job.seed, self.round, "", widths, density)
        selection = self.archive.selection(self.basis.ranking, widths)
        return compose(self.job).extractor.extract(Cut(scene, turn, selection, self.archive.order(self.basis.order)))


Hook = Callable[[Moment], Mapping[str, float]]
"""Measures; the names are the caller's. `Measure` is one."""


def described(measure: Hook | None) -> Mapping[str, Any] | str | None:
    """What a measurement measures, as JSON; of another function than `Measure` its name."""
    if isinstance(measure, Measure):
        sizes = {"samples": len(measure.y), "sets": {k: len(y) for k, (_, y) in measure.sets.items()}}
        return {"densities": list(measure.densities), "every": measure.every, **sizes}
    return None if measure is None else getattr(measure, "__qualname__", type(measure).__name__)


@dataclass(eq=False)
class Measure:
    """Measures the global model, and its submodels of given densities, on samples.

    Attributes:
        x: Inputs.
        y: Their labels.
        densities: Densities of submodels; the whole model is always measured.
        calibration: Samples on which batch-norm statistics are measured anew, at each width; None leaves them.
        every: In every so many rounds, and in the last.
        sets: Further inputs and labels, by name.

    Raises:
        ConfigError: A density is out of range, or `every` is, or there are no samples.
    """

    x: Array
    y: Array
    densities: tuple[float, ...] = ()
    calibration: Array | None = None
    every: int = 1
    sets: Mapping[str, Samples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 < d <= 1 for d in self.densities) or self.every < 1:
            raise ConfigError(
                "measure", expected="densities above 0 and at most 1, every 1 or more", got=(self.densities, self.every)
            )
        if not all(len(y) for y in (self.y, *(y for _, y in self.sets.values()))):
            raise ConfigError("measure", expected="one sample or more in each set", got=0)
        self._of: tuple[Model, Features] | None = None
        self._calibrate: Calibration | None = None
        self._sessions: dict[tuple[int, ...], Session] = {}

    def __call__(self, moment: Moment) -> dict[str, float]:
        """Accuracy and loss under `global`, `sub@0.5` and so on; of a further set under `global/name`.

        Returns:
            Accuracy (where classes are predicted) as `global`, mean loss as `global_loss`; what isn't finite is left
            out.

        Raises:
            FedpruneError: The samples don't fit the model.
        """
        if moment.round % self.every and moment.round < moment.job.rounds:
            return {}
        self._begin(moment.imported, moment.job)
        whole = Submodel(Selection.full(moment.architecture), moment.model)
        found = self._measured(moment, "global", whole)
        for density in self.densities:
            found |= self._measured(moment, f"sub@{density:g}", moment.submodel(density))
        return {k: v for k, v in found.items() if math.isfinite(v)}

    def _begin(self, model: Model, job: Job) -> None:
        """Let go of what was made for another model or recipe: one `Measure` may serve several experiments."""
        features = job.recipe.features
        if self._of is not None and self._of[0] is model and self._of[1] == features:
            return
        self._of, self._sessions = (model, features), {}
        self._calibrate = None if self.calibration is None else Calibration(model, self.calibration, features)

    def _measured(self, moment: Moment, name: str, submodel: Submodel) -> dict[str, float]:
        tensors = submodel.tensors if submodel.mask is None else submodel.mask.applied(submodel.tensors)
        if self._calibrate is not None:
            tensors = self._calibrate(tensors)
        found: dict[str, float] = {}
        for place, (x, y) in {"": (self.x, self.y), **{f"/{k}": v for k, v in self.sets.items()}}.items():
            accuracy, loss = self._score(moment, submodel.selection.widths, tensors, x, y)
            found |= {} if accuracy is None else {f"{name}{place}": accuracy}
            found[f"{name}{place}_loss"] = loss
        return found

    def _score(
        self, moment: Moment, widths: tuple[int, ...], tensors: Tensors, x: Array, y: Array
    ) -> tuple[float | None, float]:
        """Accuracy, and mean loss."""
        recipe = moment.job.recipe
        y = targets(y, recipe.loss, moment.architecture.classes)
        terms = {step.HUBER_DELTA: np.array(recipe.huber_delta)}
        session = self._session(moment.imported, widths)
        right, loss = [], 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for at in range(0, len(x), _BATCH):
                labels = y[at : at + _BATCH]
                logits = session.run({step.X: x[at : at + _BATCH], **tensors}, [step.LOGITS])[step.LOGITS]
                found = hits(recipe.loss, logits, labels)
                right += [] if found is None else [found]
                loss += data_loss(recipe.loss, logits, labels, terms) * len(labels)
        return float(np.mean(np.concatenate(right))) if right else None, loss / len(x)

    def _session(self, model: Model, widths: tuple[int, ...]) -> Session:
        """A session of the model at some widths, whose weights are inputs."""
        if widths not in self._sessions:
            graph = at_widths(model, widths)
            shapes = model.architecture.shapes(widths)
            graph.inputs += [Port(n, np.dtype(np.float32), s) for n, s in shapes.items()]
            self._sessions[widths] = Session(graph.to_bytes())
        return self._sessions[widths]
