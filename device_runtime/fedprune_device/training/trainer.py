"""Local training: a compiled step graph, fed batch by batch, without any training framework."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, DivergedError, ExitCode, FedpruneError, TrainingError
from fedprune.core.rng import keyed
from fedprune.model import step_contract
from fedprune.model.lengths import free_axis
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL, Active, Tensors
from fedprune.runtime.onnx_subgraph import GraphParts
from fedprune.runtime.placed_runs import GpuLostError
from fedprune_device.data.batches import Batches, Part, Rows, even_parts
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.stored_array import Inputs
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.step_graph import StepGraph

Array = npt.NDArray[Any]


class EarlyStopping:
    """Detects `epochs` epochs without a lower validation loss, and keeps the best weights with their `steps`."""

    def __init__(self, epochs: int, *, keep: bool = True) -> None:
        self._epochs, self._keep = epochs, keep
        self._lowest: float | None = None
        self._waited = 0
        self.tensors: dict[str, Array] = {}
        self.steps = 0
        self.squares: dict[str, Array] = {}

    def over(self, loss: float, tensors: Mapping[str, Array], steps: int, squares: Mapping[str, Array]) -> bool:
        """Record an epoch's end; True if training should end. The tensors must not be written to."""
        if self._lowest is None or loss < self._lowest:
            self._lowest, self._waited = loss, 0
            if self._keep:
                self.tensors, self.steps, self.squares = dict(tensors), steps, dict(squares)
            return False
        self._waited += 1
        return self._waited >= self._epochs


_FAR = "The learning rate may be too high for this device's data: try a lower lr, or a smaller momentum."


class TrainingStoppedError(FedpruneError):
    """Training was told to stop, because its round is over or the process ends; nothing was wrong."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True)
class TrainingResult:
    """The result of local training.

    Attributes:
        tensors: The new weights and statistics, in the order in which they were given.
        steps: Optimiser steps that led to these weights.
        samples: Local training samples.
        loss_first: Mean loss over the first tenth of the steps (at least one).
        loss_last: Mean loss over the last tenth of the steps (at least one).
        train_accuracy: Share of correctly classified samples (with `bce` of labels) in the last epoch, as seen while
            training; None where numbers are predicted.
        seconds: Wall-clock time.
        step_seconds: Median time of a step.
        last_squares: Squared gradients of the last of these steps, by tensor, if the recipe asks for them.
        moments: The optimiser's state after the last step, by the names of the training graph.
        taken: Steps behind that state, with those of earlier rounds where it was kept.
    """

    tensors: Tensors
    steps: int
    samples: int
    loss_first: float
    loss_last: float
    train_accuracy: float | None
    seconds: float
    step_seconds: float
    last_squares: Tensors
    moments: Tensors = field(default_factory=dict)
    taken: int = 0

    @classmethod
    def unmoved(cls, tensors: Tensors, steps: int, samples: int, seconds: float) -> TrainingResult:
        """The result of a training that changes nothing."""
        nothing = math.nan
        return cls(dict(tensors), steps, samples, nothing, nothing, None, seconds, seconds / max(1, steps), {})


@dataclass(frozen=True)
class TrainingTask:
    """A training that is asked for.

    Attributes:
        classes: Entries of the model's output.
        seed: The job's seed: with round and device it decides the order of the samples.
        widths: Channels per group that the tensors have; needed for ordered dropout alone.
        mask: Which elements of the tensors are active; the others are 0.
        moments: The optimiser's state to begin with, by the names of the training graph; what it lacks begins at 0.
        taken: Steps behind that state.
    """

    recipe: Recipe
    classes: int
    seed: int
    device: str
    round: int
    widths: Sequence[int] = ()
    mask: Active = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    taken: int = 0


@dataclass(frozen=True)
class TrainingControl:
    """How a training is watched and ended early.

    Attributes:
        progress: Called with (steps done, steps in all) after each step.
        stop: Asked before each step; True ends the training with an error.
        enough: Asked after each step; True ends the training with what it has reached.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    stop: Callable[[], bool] = lambda: False
    enough: Callable[[], bool] = lambda: False


class Trainer(StepGraph):
    """A loaded training graph, with what a round needs of it; arguments and errors are those of `StepGraph`."""

    @property
    def normalised(self) -> bool:
        """Whether there are batch-norm statistics that move."""
        return bool(self.statistics)

    def train(
        self, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask, control: TrainingControl | None = None
    ) -> TrainingResult:
        """Train on local data.

        Args:
            tensors: Weights and statistics as received; they are the proximal term's anchors, too.

        Raises:
            TrainingError: Graph, weights and recipe don't fit each other.
            DivergedError: A loss or weight is not finite.
            TrainingStoppedError: `control.stop` returned True.
            DataError: Labels or shapes of the data don't fit the model.
        """
        control = control or TrainingControl()
        try:
            return self._train(tensors, data, task, control)
        except GpuLostError as error:  # a training depends on nothing but what it is given
            self.leave_gpu(error)
            return self._train(tensors, data, task, control)

    def _train(
        self, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask, control: TrainingControl
    ) -> TrainingResult:
        recipe, classes = task.recipe, task.classes
        seed, round_, device = task.seed, task.round, task.device
        began = time.monotonic()
        self.check(tensors)
        wanted = self.targets(recipe, classes)
        data.check(wanted, self.input_shape, token_ids=self.token_ids)
        y = wanted(data.y_train)
        constant = self.constants(tensors, y, recipe, classes, task.mask)
        state: dict[str, Array] = {n: np.array(v, order="C") for n, v in tensors.items()}  # steps write into it
        for name in self.states:
            state[name] = np.zeros_like(state[name.partition("::")[0]])
        for name in task.moments.keys() & set(self.states):
            np.copyto(state[name], task.moments[name])
        # A step's outputs are written here: among the activations in onnxruntime's arena they would make it grow.
        spare = {n: np.empty_like(state[n]) for n in self.moving}
        plans, augmentation = self._plans(tensors, recipe, task.widths), self.augmentation(recipe)
        if len(plans) == 1:  # narrower steps cut arrays, which the processor does
            state, spare = self.place(state, "state"), self.place(spare, "next state")
            constant |= self.place({n: v for n, v in constant.items() if "::" in n}, "constant")
        batches = Batches(data.samples, recipe, normalised=self.normalised)
        validates = recipe.patience > 0 and self._can_validate(data)
        patience = EarlyStopping(recipe.patience, keep=recipe.best_epoch) if validates else None
        losses: list[float] = []
        times: list[float] = []
        squares: Tensors = {}
        hits = seen = 0
        for number, (_, rows) in enumerate(batches.rows(round_, device, seed=seed), 1):
            if control.stop():
                raise TrainingStoppedError(f"training was stopped before step {number} of {batches.steps}")
            at = time.monotonic()
            parts = [Part.of(data.x_train, y, p) for p in batches.parts(rows)]
            plan, fed = plans[0], {**constant, **state}
            fed[step_contract.LR] = np.array(recipe.rate(round_, (number - 0.5) / batches.steps), np.float32)
            if augmentation is not None:
                key = (round_, device, "augment", number)
                parts = [augmentation(part, seed, *key, place) for place, part in enumerate(parts)]
            if recipe.mixes_samples and not self.token_ids and free_axis(self.input_shape) is None:
                mixed, share = recipe.mixed([(part.make, part.y) for part in parts], seed, round_, device, number)
                parts = [Part(*part) for part in mixed]
                fed |= {step_contract.Y_SHARE: share} if recipe.features.label_pairs else {}
            if len(plans) > 1:
                plan = plans[int(keyed(seed, round_, device, "widths", number).integers(len(plans)))]
            narrower = None if plan == plans[0] else self.axes
            if narrower is not None:
                fed = narrower.narrowed(fed, plans[0], plan)
            ends = number == batches.steps or number % batches.per_epoch == 0
            asked = self.gradients if recipe.report_squares and ends else []
            into = spare if narrower is None else None
            noise = (seed, round_, device, "dropout", number)
            loss, right, moved, gradients = self.advance(fed, parts, task.taken + number, asked, into, noise)
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is not finite at step {number}", got=loss, hint=_FAR)
            if narrower is None:
                spare = {n: state[n] for n in moved}
                state |= moved
            else:
                # Statistics of narrower layers are those of other sums: only steps at the own width measure them.
                moved = {n: v for n, v in moved.items() if n not in self.statistics}
                narrower.write_back(state, moved, plans[0], plan)
            del moved
            losses.append(loss)
            if (number - 1) % batches.per_epoch == 0:
                hits = seen = 0
            hits, seen = hits + right, seen + sum(wanted.count(part.y) for part in parts)
            if gradients:
                with np.errstate(over="ignore"):  # what is not finite is an error below
                    squares = {n: np.square(np.asarray(g)) for n, g in zip(self.trainable, gradients, strict=True)}
            times.append(time.monotonic() - at)
            control.progress(number, batches.steps)
            if patience is not None and ends:
                reached = {n: np.array(state[n]) for n in tensors}
                validation_loss = self._validation_loss({**constant, **reached}, data, recipe, classes)
                if validation_loss is not None and patience.over(validation_loss, reached, number, squares):
                    break
            if control.enough():
                break
        self.release()
        steps = len(losses)
        if patience is not None and recipe.best_epoch and patience.steps:
            state |= patience.tensors
            steps, squares = patience.steps, patience.squares
        result = {n: np.asarray(state[n], np.float32) for n in tensors}
        for name, value in {**result, **{step_contract.squares(n): v for n, v in squares.items()}}.items():
            if not np.isfinite(value).all():
                raise DivergedError(f"tensor {name} is not finite after step {steps}", hint=_FAR)
        tenth = max(1, len(losses) // 10)
        return TrainingResult(
            tensors=result,
            steps=steps,
            samples=data.samples,
            loss_first=float(np.mean(losses[:tenth])),
            loss_last=float(np.mean(losses[-tenth:])),
            train_accuracy=hits / max(1, seen) if self.scores else None,
            seconds=time.monotonic() - began,
            step_seconds=float(np.median(times)),
            last_squares=squares,
            moments={n: np.asarray(state[n]) for n in self.states},
            taken=task.taken + len(losses),
        )

    def calibrated(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, *, seed: int, device: str
    ) -> Tensors:
        """Batch-norm statistics of the local training samples at these weights, which stay as they are.

        One pass in training mode, in batches of what a step works on at once: every statistic becomes the mean of the
        batches', as torch's BatchNorm has it with momentum=None. Layers' outputs aren't scaled; frozen statistics stay.
        Seed and device decide which samples share a batch.
        """
        names = self.statistics
        if not names:
            return dict(tensors)
        self.check(tensors)
        order = keyed(seed, "calibration", device).permutation(data.samples)
        batches = even_parts(order, recipe.micro_batch)
        feeds = {n: np.asarray(v, order="C") for n, v in tensors.items() if n not in names}
        feeds |= self.masking(tensors, replace(recipe, scale=1.0, mask_threshold=0.0), ALL)
        return dict(tensors) | batch_norm_statistics(self.run_forward, names, feeds, data.x_train, batches, tensors)

    def loss(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, classes: int, samples: int = 32
    ) -> float:
        """Data loss of the first training samples at these weights, which don't change, without masks and scaler."""
        self.check(tensors)
        y = self.targets(recipe, classes)(data.y_train)
        feeds = self.constants(tensors, y, replace(recipe, scale=1.0, mask_threshold=0.0), classes)
        feeds |= {n: np.asarray(v, order="C") for n, v in tensors.items()}
        feeds |= {n: np.zeros_like(feeds[n.partition("::")[0]]) for n in self.states}
        rows = np.arange(min(samples, len(y)))
        batches = Batches(data.samples, recipe, normalised=self.normalised)
        parts = [Part.of(data.x_train, y, p) for p in batches.parts(rows)]
        batches_of = [parts] if self.accumulates else [[part] for part in parts]
        losses = [self.advance(feeds, each, 1).loss for each in batches_of]
        self.release()
        if self.accumulates:
            return losses[0]
        return float(np.average(losses, weights=[self.divisor(part.y, feeds) for part in parts]))

    def _can_validate(self, data: LocalData) -> bool:
        return len(data.y_val) > (1 if self.normalised else 0)  # statistics of a single sample are worthless

    def _validation_loss(self, feeds: dict[str, Array], data: LocalData, recipe: Recipe, classes: int) -> float | None:
        """Data loss of the validation samples, as a step sees it (batch norm takes their statistics), but unscaled.

        None where all of them are of classes that the training samples lack, so that they weigh nothing.
        """
        y = self.targets(recipe, classes)(data.y_val)
        feeds = dict(feeds)
        if step_contract.OUTPUT_SCALE in feeds:
            feeds[step_contract.OUTPUT_SCALE] = np.array(1, np.float32)
        loss = total = 0.0
        for rows in even_parts(np.arange(len(y)), recipe.micro_batch):
            part = Part.of(data.x_val, y, rows)
            weight = self.divisor(part.y, feeds)
            if not weight:
                continue  # of classes that the training samples lack, which weigh nothing
            own = {
                step_contract.X: part.x,
                step_contract.Y: part.y,
                step_contract.DIVISOR: np.array(weight, np.float32),
            }
            own[step_contract.Y_PARTNER] = part.y
            loss += weight * float(self.run_forward({**feeds, **own}, [step_contract.LOSS])[step_contract.LOSS])
            total += weight
        if not math.isfinite(loss):
            raise DivergedError("the validation loss is not finite", got=loss, hint=_FAR)
        return loss / total if total else None

    def _plans(self, tensors: Mapping[str, Array], recipe: Recipe, widths: Sequence[int]) -> list[tuple[int, ...]]:
        """The widths at which steps train, the tensors' own first."""
        if not recipe.ordered_dropout:
            return [()]
        try:
            axes = self.axes or TensorAxes.from_json("{}")
            plans = axes.plans(widths, recipe.ordered_dropout)
            axes.check(tensors, plans[0])
        except BundleError as error:
            raise TrainingError(
                f"ordered dropout: {error}", hint="The training graph must be made for this recipe."
            ) from error
        return plans


class TrainerCache:
    """The training graph that was used last, which another runner's round usually needs again.

    A board doesn't `keep` it after training: the new model needs its memory, and loading it takes less than two steps.
    The parts that were cut of it stay until another graph is used.
    """

    def __init__(self, threads: int = 1, *, keep: bool = False, cuda: bool = False) -> None:
        self.threads = threads
        self._cuda = cuda
        self._keep = keep
        self._loaded: tuple[tuple[str, Path | None], Trainer] | None = None
        self._parts = ("", GraphParts())

    def of(self, sha256: str, read: Callable[[], bytes], base: Path | None = None) -> Trainer:
        """A trainer for a graph and the frozen base that it reads; `read` gives its bytes if they are needed."""
        key = (sha256, base)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two loaded models are more than a small board has memory for
            if self._parts[0] != sha256:
                self._parts = (sha256, GraphParts())
            trainer = Trainer(read(), threads=self.threads, cuda=self._cuda, base=base, parts=self._parts[1])
            self._loaded = (key, trainer)
        return self._loaded[1]

    def predictor(self, model: Path) -> Predictor:
        """A staged model, opened."""
        return Predictor(model, threads=self.threads, cuda=self._cuda)

    def release(self) -> None:
        """Training is over."""
        if not self._keep:
            self._loaded = None


Run = Callable[[dict[str, Array], Sequence[str]], Mapping[str, Array]]  # takes feeds and names of outputs

_HUGE = np.float32(2.0**40)
"""An old value that makes a batch's negligible, so that the share of it that is kept is exact to the last bit."""


def batch_norm_statistics(
    run: Run,
    names: Collection[str],
    feeds: Mapping[str, Array],
    x: Inputs,
    batches: Sequence[Rows],
    old: Mapping[str, Array],
) -> Tensors:
    """Statistics of some samples: the mean over all batches, as torch's BatchNorm has it with momentum=None.

    The dozen steps of a round hardly move running statistics; one pass over the local samples corrects that. A
    statistic's next value is linear in its old one, next = kept · old + (1 − kept) · (the batch's), so that feeding 0
    gives the batch's. `feeds` are all other inputs except the samples. A statistic that the graph leaves alone, or that
    isn't finite afterwards, keeps its `old` value.
    """
    outputs = [step_contract.following(n) for n in names]
    none = {n: np.zeros_like(old[n]) for n in names}
    huge = run(
        {**feeds, **{n: np.full_like(v, _HUGE) for n, v in none.items()}, step_contract.X: x[batches[0]]}, outputs
    )
    totals: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(old[n].shape, np.float64) for n in names}
    for rows in batches:
        out = run({**feeds, **none, step_contract.X: x[rows]}, outputs)
        for name in names:
            totals[name] += np.asarray(out[step_contract.following(name)], np.float64)
    result: Tensors = {}
    for name in names:
        taken = 1.0 - float(np.median(np.asarray(huge[step_contract.following(name)]))) / float(_HUGE)
        fresh = totals[name] / (len(batches) * taken) if taken > 0 else totals[name] * np.nan
        result[name] = np.asarray(fresh if np.isfinite(fresh).all() else old[name], np.float32)
    return result
