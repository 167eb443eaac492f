"""Measurements of the global model after each round of a simulation.

The coordinator never sees them, so a test set used here can't leak into allocators, schedules or early stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt

from fedprune.coordination import commands as do
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.values import Cut, Memory, Scene, Submodel, Turn
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.evaluator import Evaluation, Evaluator, Sessions, check_samples

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Moment:
    """A closed round as a measurement sees it.

    Attributes:
        job: The job's settings.
        imported: The imported model with its initial weights.
        round: The round, from 1.
        clock: Virtual seconds since the start.
        before: The clock at the previous round's end; 0 in the first round.
        parts: The devices' parts whose updates made the new model.
        basis: The source of the round's submodels; its `model` is the previous one.
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
        return self.imported.architecture

    @cached_property
    def model(self) -> Tensors:
        """The new global model."""
        return self.archive.model(self.digest)

    @cached_property
    def ranking(self) -> Selection:
        """The round's channel ranking, at full width."""
        return self.archive.selection(self.basis.ranking, self.architecture.sizes)

    @cached_property
    def memory(self) -> Memory:
        """The strategy's memory at the round's start."""
        return self.archive.memory(self.basis.memory)

    def submodel(self, density: float) -> Submodel:
        """The submodel that the strategy would cut from the new model for an unseen device.

        It keeps the same share of each channel group or, if the strategy's densities count elements, that share of
        elements.

        Args:
            density: Kept share, above 0 and at most 1.
        """
        sizes = self.architecture.sizes
        strategy = compose(self.job)
        elements = strategy.allocator is not None and strategy.allocator.elements
        widths = sizes if elements else widths_at(self.architecture, density)
        scene = Scene(
            self.architecture, self.job.seed, self.round, self.model, self.memory, self.job.recipe, participants=()
        )
        turn = Turn(self.job.seed, self.round, "", widths, density)
        selection = self.archive.selection(self.basis.ranking, widths)
        return strategy.extract(Cut(scene, turn, selection, self.archive.order(self.basis.order)))


Hook = Callable[[Moment], Mapping[str, float]]
"""Returns named measurements of a round; see `Measure`."""


def described(measure: Hook | None) -> Mapping[str, Any] | str | None:
    """A measurement's settings as JSON; the function's name for a user's own."""
    if isinstance(measure, Measure):
        sizes = {"samples": len(measure.y), "sets": {k: len(y) for k, (_, y) in measure.sets.items()}}
        return {"densities": list(measure.densities), "every": measure.every, **sizes}
    return None if measure is None else getattr(measure, "__qualname__", type(measure).__name__)


@dataclass(eq=False)
class Measure:
    """Evaluates the global model and its submodels.

    Attributes:
        x: Inputs.
        y: Labels.
        densities: Densities of submodels, in addition to the whole model.
        calibration: Samples to re-estimate batch-norm statistics at each width; None keeps them.
        every: Rounds between two measurements; the last round is always measured.
        sets: Further inputs and labels, by name.

    Raises:
        ConfigError: A density or `every` is out of range, or a set has no samples.
    """

    x: Array
    y: Array
    densities: tuple[float, ...] = ()
    calibration: Array | None = None
    every: int = 1
    sets: Mapping[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 < d <= 1 for d in self.densities) or self.every < 1:
            raise ConfigError(
                "measure", expected="densities above 0 and at most 1, every 1 or more", got=(self.densities, self.every)
            )
        for samples in ((self.x, self.y), *self.sets.values()):
            check_samples(samples)
        self._of: tuple[Model, Recipe] | None = None
        self._calibrate: Calibration | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def __call__(self, moment: Moment) -> dict[str, float]:
        """Accuracy and loss as `global`, `sub@0.5` and so on; of a further set as `global/name`.

        Returns:
            Accuracy (classification only) under the name itself, mean loss under `..._loss`. Values that are not finite
            are omitted.

        Raises:
            FedpruneError: The samples don't fit the model.
        """
        if moment.round % self.every and moment.round < moment.job.rounds:
            return {}
        self._begin(moment.imported, moment.job.recipe)
        whole = Submodel(Selection.full(moment.architecture), moment.model)
        found = self._measured("global", whole)
        for density in self.densities:
            found |= self._measured(f"sub@{density:g}", moment.submodel(density))
        return found

    def _begin(self, model: Model, recipe: Recipe) -> None:
        """Drop what was built for another model or recipe: one `Measure` may serve several experiments."""
        if self._of is not None and self._of[0] is model and self._of[1] == recipe:
            return
        sessions = Sessions(model, 1 + len(self.densities))  # what one round asks for
        sets = {"": (self.x, self.y), **{f"/{k}": v for k, v in self.sets.items()}}
        self._evaluators = {place: Evaluator(sessions, recipe, samples) for place, samples in sets.items()}
        self._calibrate = None if self.calibration is None else Calibration(model, self.calibration, recipe.features)
        self._of = (model, recipe)

    def _measured(self, name: str, submodel: Submodel) -> dict[str, float]:
        tensors = submodel.tensors if submodel.mask is None else submodel.mask.applied(submodel.tensors)
        if self._calibrate is not None:
            tensors = self._calibrate(tensors)
        found: dict[str, float] = {}
        for place, evaluate in self._evaluators.items():
            score = evaluate(tensors, submodel.selection.widths)
            for metric, key in (("accuracy", f"{name}{place}"), ("loss", f"{name}{place}_loss")):
                if metric in score:
                    found[key] = score[metric]
        return found
