"""Measurements of a simulation's global model after each round, and of the submodels that would be cut from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt

from fedprune.coordination import commands as do
from fedprune.core.errors import ConfigError
from fedprune.core.metrics import LOSS, primary_metric
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.element_mask import apply_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.values import Cut, Memory, Scene, Submodel, Turn
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.server_samples import LabelledSamples, check_samples

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class MeasuredRound:
    """A closed round as a measurement sees it.

    Attributes:
        previous_clock: The clock at the previous round's end; 0 in the first round.
        parts: The devices' parts whose updates made the new model.
        basis: The source of the round's submodels; its `model` is the previous one.
        digest: Digest of the new global model.
        archive: Reads models, rankings and memories.
    """

    job: Job
    imported: Model
    round: int
    clock: float
    previous_clock: float
    parts: tuple[do.DevicePart, ...]
    basis: do.Basis
    digest: str
    archive: Archive

    @property
    def architecture(self) -> Architecture:
        return self.imported.architecture

    @cached_property
    def model(self) -> Tensors:
        return self.archive.model(self.digest)

    @cached_property
    def ranking(self) -> Selection:
        """The round's channel ranking, at full width."""
        return self.archive.selection(self.basis.ranking, self.architecture.sizes)

    @cached_property
    def memory(self) -> Memory:
        return self.archive.memory(self.basis.memory)

    def submodel(self, density: float) -> Submodel:
        """The submodel that the strategy would cut from the new model for an unseen device.

        It keeps the same share of each channel group or, if the strategy's densities count elements, that share of
        elements. `density` is the kept share, above 0 and at most 1.
        """
        job, architecture, strategy = self.job, self.architecture, compose(self.job)
        masks_elements = strategy.allocator is not None and strategy.allocator.masks_elements
        widths = architecture.sizes if masks_elements else widths_at(architecture, density)
        scene = Scene(architecture, job.seed, self.round, self.model, self.memory, job.training_recipe, participants=())
        turn = Turn(job.seed, self.round, "", widths, density)
        selection = self.archive.selection(self.basis.ranking, widths)
        return strategy.extract(Cut(scene, turn, selection, self.archive.order(self.basis.order)))


# Returns named measurements of a round; see `ModelMeasure`.
MeasurementHook = Callable[[MeasuredRound], Mapping[str, float]]


def measure_settings(measure: MeasurementHook | None) -> Mapping[str, Any] | str | None:
    """A measurement's settings as JSON; for a user's function its name."""
    if isinstance(measure, ModelMeasure):
        sizes = {"samples": len(measure.y), "sets": {k: len(y) for k, (_, y) in measure.sets.items()}}
        return {"densities": list(measure.densities), "every": measure.every, **sizes}
    return None if measure is None else getattr(measure, "__qualname__", type(measure).__name__)


@dataclass(eq=False)
class ModelMeasure:
    """Evaluates the global model and its submodels.

    Raises `ConfigError` if a density or `every` is out of range, or a set has no samples.

    Attributes:
        densities: Densities of submodels, in addition to the whole model.
        calibration: Samples to re-estimate batch-norm statistics at each width; None keeps them.
        every: Rounds between two measurements; the last round is always measured.
        sets: Further inputs and labels, by name.
    """

    x: Array
    y: Array
    densities: tuple[float, ...] = ()
    calibration: Array | None = None
    every: int = 1
    sets: Mapping[str, LabelledSamples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 < d <= 1 for d in self.densities) or self.every < 1:
            raise ConfigError(
                "measure", expected="densities above 0 and at most 1, every 1 or more", got=(self.densities, self.every)
            )
        for samples in ((self.x, self.y), *self.sets.values()):
            check_samples(samples)
        self._built_for: tuple[Model, Recipe] | None = None
        self._calibrate: Calibration | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def __call__(self, moment: MeasuredRound) -> dict[str, float]:
        """Measure the global model as `global` and submodels as `sub@0.5`; on a further set as `global/name`.

        The leading metric, unless it is a loss, has the name itself, and the mean loss the name with `_loss`. Values
        that are not finite are omitted. Raises `FedpruneError` if the samples don't fit the model.
        """
        if moment.round % self.every and moment.round < moment.job.rounds:
            return {}
        self._begin(moment.imported, moment.job.recipe)
        full_model = Submodel(Selection.full(moment.architecture), moment.model)
        measurements = self._measure_submodel("global", full_model)
        for density in self.densities:
            measurements |= self._measure_submodel(f"sub@{density:g}", moment.submodel(density))
        return measurements

    def _begin(self, model: Model, recipe: Recipe) -> None:
        """Drop what was built for another model or recipe: one `ModelMeasure` may serve several experiments."""
        if self._built_for is not None and self._built_for[0] is model and self._built_for[1] == recipe:
            return
        sessions = ModelSessions(model, 1 + len(self.densities))  # what one round asks for
        sets = {"": (self.x, self.y), **{f"/{k}": v for k, v in self.sets.items()}}
        self._evaluators = {suffix: Evaluator(sessions, recipe, samples) for suffix, samples in sets.items()}
        self._calibrate = None if self.calibration is None else Calibration(model, self.calibration, recipe.features)
        self._built_for = (model, recipe)

    def _measure_submodel(self, name: str, submodel: Submodel) -> dict[str, float]:
        tensors = apply_mask(submodel.mask, submodel.tensors)
        if self._calibrate is not None:
            tensors = self._calibrate(tensors)
        measurements: dict[str, float] = {}
        for suffix, evaluate in self._evaluators.items():
            score = evaluate(tensors, submodel.selection.widths)
            leading_metric = primary_metric(score)
            if leading_metric is not None and leading_metric[0] is not LOSS:
                measurements[f"{name}{suffix}"] = leading_metric[1]
            if LOSS.name in score:
                measurements[f"{name}{suffix}_loss"] = score[LOSS.name]
        return measurements
