"""A simulation's notes of each round: costs, channels, and measurements of the global model.

The coordinator never sees them, so a test set used here can't leak into allocators, schedules or early stopping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.core.metrics import LOSS, primary_metric
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.element_mask import apply_mask, mask_from_bits
from fedprune.model.nested_widths import TensorAxes, axes_json
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.planning.costs import active_macs_share, costs_at
from fedprune.strategies import compose
from fedprune.strategies.values import Cut, Memory, Scene, Submodel, Turn
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.executor.calibration import Calibration
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from fedprune_server.executor.server_samples import LabelledSamples, check_samples
from fedprune_server.monitoring.round_rows import RoundNotes

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
        sizes = self.architecture.sizes
        strategy = compose(self.job)
        masks_elements = strategy.allocator is not None and strategy.allocator.masks_elements
        widths = sizes if masks_elements else widths_at(self.architecture, density)
        scene = Scene(
            self.architecture,
            self.job.seed,
            self.round,
            self.model,
            self.memory,
            self.job.training_recipe,
            participants=(),
        )
        turn = Turn(self.job.seed, self.round, "", widths, density)
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


_MAX_MAPS = 100  # approximate number of rounds whose channel coverage is recorded


class RoundRecorder:
    """Records a round's notes while its blobs exist."""

    def __init__(self, job: Job, model: Model, store: BlobStore, measure: MeasurementHook | None) -> None:
        self._job = job
        self._model = model
        self._store = store
        self._archive = Archive(model.architecture, store)
        self._measure = measure
        self._macs: dict[tuple[int, ...], int] = {}
        self._shares: dict[tuple[str, tuple[int, ...]], float] = {}

    def record_round(
        self, notes: RoundNotes, command: do.Close, event: on.Closed, basis: do.Basis, clock: float, before: float
    ) -> None:
        """Record a closed round.

        Raises `FedpruneError` if the measurement fails.

        Args:
            basis: Source of the last submodels, for a round without updates.
            before: The clock at the previous round's end; 0 in the first round.
        """
        contributions = [c for c in command.contributions if c.part.device not in event.rejected]
        notes.updates, notes.limited = len(contributions), event.reduced
        if contributions and self._records_coverage(command.round):
            notes.coverage = self._coverage(contributions)
        # Before the first ranking there is nothing that a submodel could be cut by.
        if self._measure is None or not (contributions or basis.ranking):
            return
        moment = MeasuredRound(
            self._job,
            self._model,
            command.round,
            clock,
            before,
            tuple(c.part for c in contributions),
            max((c.basis for c in contributions), key=lambda b: b.round, default=basis),
            event.model,
            self._archive,
        )
        measurements = {str(k): float(v) for k, v in self._measure(moment).items()}
        # Any function may measure, and what isn't finite can't be written as JSON.
        notes.measured = {k: v for k, v in measurements.items() if math.isfinite(v)}

    def _records_coverage(self, number: int) -> bool:
        """Whether a round's channels are recorded."""
        return number % max(1, self._job.rounds // _MAX_MAPS) == 0 or number in (1, self._job.rounds)

    def macs(self, device: str, number: int, offer: Mapping[str, Any], steps: int, samples: int) -> int:
        """MACs of a training, forward and backward, with each step at its own widths."""
        widths, recipe = tuple(offer["widths"]), Recipe.from_dict(offer["recipe"])
        # Rounded up: the last batch of an epoch may be smaller.
        per_epoch = -(-samples // recipe.batch_size)
        if not recipe.ordered_dropout:
            epochs, remaining_steps = divmod(steps, per_epoch)
            trained_samples = epochs * samples + min(remaining_steps * recipe.batch_size, samples)
            return self._macs_per_sample(widths) * trained_samples
        plans = self._axes.step_widths(widths, recipe.ordered_dropout)
        total = 0
        for step in range(1, steps + 1):
            # The board's own draw of a step's width, by the same keys (`fedprune_device.training`).
            plan_index = int(keyed_generator(offer["seed"], number, device, "widths", step).integers(len(plans)))
            first_sample = (step - 1) % per_epoch * recipe.batch_size
            total += self._macs_per_sample(plans[plan_index]) * min(recipe.batch_size, samples - first_sample)
        return total

    def active_share(self, offer: Mapping[str, Any]) -> float:
        """Share of a training's MACs whose weight is active in the offer's mask; 1 without one."""
        if not offer.get("mask"):
            return 1.0
        widths, architecture = tuple(offer["widths"]), self._model.architecture
        key = offer["mask"]["sha256"], widths
        if key not in self._shares:
            bits = tensorfile.decode(self._store.read(key[0]))
            mask = mask_from_bits(bits, architecture.shapes(widths))
            self._shares = {key: active_macs_share(architecture, widths, mask)}  # a round's masks are mostly alike
        return self._shares[key]

    def _macs_per_sample(self, widths: tuple[int, ...]) -> int:
        if widths not in self._macs:
            self._macs[widths] = costs_at(self._model.architecture, widths).training_macs
        return self._macs[widths]

    @cached_property
    def _axes(self) -> TensorAxes:
        return TensorAxes.from_json(axes_json(self._model.architecture))

    def _coverage(self, contributions: Sequence[do.Contribution]) -> list[list[int]]:
        """Number of updates that held each channel, per group."""
        counts = [np.zeros(size, np.int64) for size in self._model.architecture.sizes]
        for contribution in contributions:
            selection = self._archive.selection(
                contribution.ranking or contribution.basis.ranking, contribution.widths or contribution.part.widths
            )
            for count, rank, width in zip(counts, selection.ranks, selection.widths, strict=True):
                count[rank[:width]] += 1
        return [[int(c) for c in count] for count in counts]
