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
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.lengths import free_axis
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Tensors
from fedprune.runtime.onnx_subgraph import Subgraphs
from fedprune.runtime.placed_runs import GpuLostError
from fedprune_device.data.batches import Batches, MicroBatch, Rows, even_chunks
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
        self._epochs_without_gain = 0
        self.tensors: dict[str, Array] = {}
        self.steps = 0
        self.squares: dict[str, Array] = {}

    def ends_training(
        self, loss: float, tensors: Mapping[str, Array], steps: int, squares: Mapping[str, Array]
    ) -> bool:
        """Record an epoch's end; True if training should end. The tensors must not be written to."""
        if self._lowest is None or loss < self._lowest:
            self._lowest, self._epochs_without_gain = loss, 0
            if self._keep:
                self.tensors, self.steps, self.squares = dict(tensors), steps, dict(squares)
            return False
        self._epochs_without_gain += 1
        return self._epochs_without_gain >= self._epochs


_DIVERGENCE_HINT = "The learning rate may be too high for this device's data: try a lower lr, or a smaller momentum."


class TrainingStoppedError(FedpruneError):
    """Training was told to stop, because its round is over or the process ends; nothing was wrong."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True)
class TrainingResult:
    """The result of a local training.

    Attributes:
        tensors: The new weights and statistics, in the order in which they were given.
        steps: Optimiser steps that led to these weights.
        samples: Local training samples.
        loss_first: Mean loss over the first tenth of the steps (at least one).
        loss_last: Mean loss over the last tenth of the steps (at least one).
        train_accuracy: Share of correctly classified samples (with `bce` of labels) in the last epoch, counted by its
            steps; None where numbers are predicted.
        seconds: Wall-clock time.
        step_seconds: Median time of a step.
        last_squares: Squared gradients of the last of these steps, by tensor, if the recipe asks for them.
        moments: The optimiser's state after the last step, by the names of the training graph.
        optimizer_steps: Steps behind that state, with those of earlier rounds where it was kept.
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
    optimizer_steps: int = 0

    @classmethod
    def without_change(cls, tensors: Tensors, steps: int, samples: int, seconds: float) -> TrainingResult:
        """The result of a training that changes nothing."""
        return cls(
            dict(tensors),
            steps,
            samples,
            loss_first=math.nan,
            loss_last=math.nan,
            train_accuracy=None,
            seconds=seconds,
            step_seconds=seconds / max(1, steps),
            last_squares={},
        )


@dataclass(frozen=True)
class TrainingTask:
    """The job, round and state of a training.

    Attributes:
        classes: Entries of the model's output.
        seed: The job's seed: with round and device it decides the order of the samples.
        widths: Channels per group that the tensors have; needed for ordered dropout alone.
        mask: Which elements of the tensors are active; the others are 0.
        moments: The optimiser's state to begin with, by the names of the training graph; what it lacks begins at 0.
        optimizer_steps: Steps behind that state.
    """

    recipe: Recipe
    classes: int
    seed: int
    device: str
    round: int
    widths: Sequence[int] = ()
    mask: ElementMask = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    optimizer_steps: int = 0


@dataclass(frozen=True)
class TrainingControl:
    """Callbacks that watch a training and may end it early.

    Attributes:
        progress: Called with (steps done, steps in all) after each step.
        stop: Asked before each step; True ends the training with an error.
        enough: Asked after each step; True ends the training with what it has reached.
    """

    progress: Callable[[int, int], None] = lambda done, total: None
    stop: Callable[[], bool] = lambda: False
    enough: Callable[[], bool] = lambda: False


class _TrainingRun:
    """One training under way: the inputs of its steps, the arrays that they write into, and what was counted so far."""

    def __init__(self, graph: StepGraph, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask) -> None:
        recipe, classes = task.recipe, task.classes
        self._graph, self._data, self._task, self._names = graph, data, task, tuple(tensors)
        graph.check(tensors)
        self._targets = graph.targets(recipe, classes)
        data.check(self._targets, graph.input_shape, token_ids=graph.token_ids)
        self._y = self._targets(data.y_train)
        self._constants = graph.constant_inputs(tensors, self._y, recipe, classes, task.mask)
        # Copies, because steps write into them.
        self._state: dict[str, Array] = {n: np.array(v, order="C") for n, v in tensors.items()}
        for name in graph.optimizer_states:
            self._state[name] = np.zeros_like(self._state[name.partition("::")[0]])
        for name in task.moments.keys() & set(graph.optimizer_states):
            np.copyto(self._state[name], task.moments[name])
        # A step's outputs are written here: among the activations in onnxruntime's arena they would make it grow.
        self._spare = {n: np.empty_like(self._state[n]) for n in graph.updated_names}
        self._width_plans = self._all_width_plans(tensors)
        self._augmentation = graph.augmentation(recipe)
        if len(self._width_plans) == 1:  # narrower steps cut arrays, which the processor does
            self._state, self._spare = graph.place(self._state, "state"), graph.place(self._spare, "next state")
            self._constants |= graph.place({n: v for n, v in self._constants.items() if "::" in n}, "constant")
        normalised = bool(graph.statistics)
        self.batches = Batches(data.samples, recipe, normalised=normalised)
        # Batch-norm statistics of a single sample are worthless.
        validates = recipe.patience > 0 and len(data.y_val) > (1 if normalised else 0)
        self._early_stopping = EarlyStopping(recipe.patience, keep=recipe.best_epoch) if validates else None
        self._losses: list[float] = []
        self._step_times: list[float] = []
        self._squares: Tensors = {}
        self._epoch_hits = self._epoch_labels = 0

    def step(self, number: int, rows: Rows) -> None:
        """Carry out step `number`, from 1, on these training samples; raises `DivergedError`."""
        began = time.monotonic()
        graph, task, recipe = self._graph, self._task, self._task.recipe
        micro_batches, mix_shares = self._micro_batches(number, rows)
        feeds = {**self._constants, **self._state, **mix_shares}
        # The rate at the middle of the step, so that no step of a schedule has a rate of 0 and is lost.
        learning_rate = recipe.learning_rate(task.round, (number - 0.5) / self.batches.steps)
        feeds[step_contract.LR] = np.array(learning_rate, np.float32)
        own_widths, widths = self._width_plans[0], self._step_widths(number)
        narrower_axes = None if widths == own_widths else graph.axes
        if narrower_axes is not None:
            feeds = narrower_axes.narrow(feeds, own_widths, widths)
        gradient_names = graph.gradients if recipe.report_squares and self._ends_epoch(number) else []
        spare = self._spare if narrower_axes is None else None
        dropout_key = (task.seed, task.round, task.device, "dropout", number)
        loss, hits, values, gradients = graph.run_step(
            feeds, micro_batches, task.optimizer_steps + number, gradient_names, spare, dropout_key
        )
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is not finite at step {number}", got=loss, hint=_DIVERGENCE_HINT)
        if narrower_axes is None:
            self._spare = {n: self._state[n] for n in values}
            self._state |= values
        else:
            # Statistics of narrower layers are those of other sums: only steps at the own width measure them.
            values = {n: v for n, v in values.items() if n not in graph.statistics}
            narrower_axes.write_back(self._state, values, own_widths, widths)
        self._losses.append(loss)
        if (number - 1) % self.batches.per_epoch == 0:
            self._epoch_hits = self._epoch_labels = 0
        self._epoch_hits += hits
        self._epoch_labels += sum(self._targets.count(micro_batch.y) for micro_batch in micro_batches)
        if gradients:
            with np.errstate(over="ignore"):  # `result` refuses what is not finite
                squares = (np.square(np.asarray(gradient)) for gradient in gradients)
                self._squares = dict(zip(graph.trainable, squares, strict=True))
        self._step_times.append(time.monotonic() - began)

    def stops_early(self, number: int) -> bool:
        """Whether step `number` ends an epoch after which validation samples say that more training is useless."""
        if self._early_stopping is None or not self._ends_epoch(number):
            return False
        weights = {n: np.array(self._state[n]) for n in self._names}
        loss = self._validation_loss({**self._constants, **weights})
        return loss is not None and self._early_stopping.ends_training(loss, weights, number, self._squares)

    def result(self, seconds: float) -> TrainingResult:
        """The result of all steps, or of the best epoch; raises `DivergedError` if a tensor is not finite."""
        losses, best, steps = self._losses, self._early_stopping, len(self._losses)
        if best is not None and self._task.recipe.best_epoch and best.steps:
            self._state |= best.tensors
            steps, self._squares = best.steps, best.squares
        tensors = {n: np.asarray(self._state[n], np.float32) for n in self._names}
        for name, value in {**tensors, **{step_contract.squares_name(n): v for n, v in self._squares.items()}}.items():
            if not np.isfinite(value).all():
                raise DivergedError(f"tensor {name} is not finite after step {steps}", hint=_DIVERGENCE_HINT)
        tenth = max(1, len(losses) // 10)
        return TrainingResult(
            tensors=tensors,
            steps=steps,
            samples=self._data.samples,
            loss_first=float(np.mean(losses[:tenth])),
            loss_last=float(np.mean(losses[-tenth:])),
            train_accuracy=self._epoch_hits / max(1, self._epoch_labels) if self._graph.counts_hits else None,
            seconds=seconds,
            step_seconds=float(np.median(self._step_times)),
            last_squares=self._squares,
            moments={n: np.asarray(self._state[n]) for n in self._graph.optimizer_states},
            optimizer_steps=self._task.optimizer_steps + len(losses),
        )

    def _ends_epoch(self, number: int) -> bool:
        return number == self.batches.steps or number % self.batches.per_epoch == 0

    def _micro_batches(self, number: int, rows: Rows) -> tuple[list[MicroBatch], dict[str, Array]]:
        """A step's samples, augmented and mixed as the recipe says, and the inputs that mixing adds."""
        graph, task, recipe = self._graph, self._task, self._task.recipe
        chunks = self.batches.micro_batches(rows)
        micro_batches = [MicroBatch.of(self._data.x_train, self._y, chunk) for chunk in chunks]
        if self._augmentation is not None:
            key = (task.round, task.device, "augment", number)
            micro_batches = [self._augmentation(m, task.seed, *key, i) for i, m in enumerate(micro_batches)]
        # Token ids can't be averaged, nor samples of different lengths.
        if not recipe.mixes_samples or graph.token_ids or free_axis(graph.input_shape) is not None:
            return micro_batches, {}
        pairs = [(m.make, m.y) for m in micro_batches]
        mixed, share = recipe.mix_batch(pairs, task.seed, task.round, task.device, number)
        return [MicroBatch(*arrays) for arrays in mixed], {
            step_contract.Y_SHARE: share
        } if recipe.features.label_pairs else {}

    def _all_width_plans(self, tensors: Mapping[str, Array]) -> list[tuple[int, ...]]:
        """The widths at which steps train, the tensors' own first."""
        if not self._task.recipe.ordered_dropout:
            return [()]
        try:
            axes = self._graph.axes or TensorAxes.from_json("{}")
            plans = axes.step_widths(self._task.widths, self._task.recipe.ordered_dropout)
            axes.check(tensors, plans[0])
        except BundleError as error:
            raise TrainingError(
                f"ordered dropout: {error}", hint="The training graph must be made for this recipe."
            ) from error
        return plans

    def _step_widths(self, number: int) -> tuple[int, ...]:
        """The widths at which a step trains: with ordered dropout drawn anew for each."""
        plans, task = self._width_plans, self._task
        if len(plans) == 1:
            return plans[0]
        return plans[int(keyed_generator(task.seed, task.round, task.device, "widths", number).integers(len(plans)))]

    def _validation_loss(self, feeds: dict[str, Array]) -> float | None:
        """Data loss of the validation samples, as a step sees it (batch norm takes their statistics), but unscaled.

        None if the training samples lack the classes of all of them, so that they weigh nothing.
        """
        graph, recipe = self._graph, self._task.recipe
        y = graph.targets(recipe, self._task.classes)(self._data.y_val)
        if step_contract.OUTPUT_SCALE in feeds:
            feeds = {**feeds, step_contract.OUTPUT_SCALE: np.array(1, np.float32)}
        loss = total = 0.0
        for rows in even_chunks(np.arange(len(y)), recipe.micro_batch):
            batch = MicroBatch.of(self._data.x_val, y, rows)
            weight = graph.divisor(batch.y, feeds)
            if not weight:  # all of classes that the training samples lack
                continue
            inputs = {
                step_contract.X: batch.x,
                step_contract.Y: batch.y,
                step_contract.Y_PARTNER: batch.y,
                step_contract.DIVISOR: np.array(weight, np.float32),
            }
            outputs = graph.run_forward({**feeds, **inputs}, [step_contract.LOSS])
            loss += weight * float(outputs[step_contract.LOSS])
            total += weight
        if not math.isfinite(loss):
            raise DivergedError("the validation loss is not finite", got=loss, hint=_DIVERGENCE_HINT)
        return loss / total if total else None


class Trainer(StepGraph):
    """A loaded training graph, with what a round needs of it; arguments and errors are those of `StepGraph`."""

    @property
    def has_batch_norm(self) -> bool:
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
        except GpuLostError as error:  # a training depends on its arguments alone, so that it may begin again
            self.leave_gpu(error)
            return self._train(tensors, data, task, control)

    def _train(
        self, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask, control: TrainingControl
    ) -> TrainingResult:
        began = time.monotonic()
        run = _TrainingRun(self, tensors, data, task)
        steps = run.batches.steps
        for number, (_, rows) in enumerate(run.batches.rows(task.round, task.device, seed=task.seed), 1):
            if control.stop():
                raise TrainingStoppedError(f"training was stopped before step {number} of {steps}")
            run.step(number, rows)
            control.progress(number, steps)
            if run.stops_early(number) or control.enough():
                break
        self.release()
        return run.result(time.monotonic() - began)

    def calibrate(
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
        order = keyed_generator(seed, "calibration", device).permutation(data.samples)
        batches = even_chunks(order, recipe.micro_batch)
        feeds = {n: np.asarray(v, order="C") for n, v in tensors.items() if n not in names}
        feeds |= self.mask_inputs(tensors, replace(recipe, scale=1.0, mask_threshold=0.0), ALL_ACTIVE)
        return dict(tensors) | batch_norm_statistics(self.run_forward, names, feeds, data.x_train, batches, tensors)

    def loss(
        self, tensors: Mapping[str, Array], data: LocalData, recipe: Recipe, classes: int, samples: int = 32
    ) -> float:
        """Data loss of the first training samples at these weights, which don't change, without masks and scaler."""
        self.check(tensors)
        y = self.targets(recipe, classes)(data.y_train)
        feeds = self.constant_inputs(tensors, y, replace(recipe, scale=1.0, mask_threshold=0.0), classes)
        feeds |= {n: np.asarray(v, order="C") for n, v in tensors.items()}
        feeds |= {n: np.zeros_like(feeds[n.partition("::")[0]]) for n in self.optimizer_states}
        rows = np.arange(min(samples, len(y)))
        batches = Batches(data.samples, recipe, normalised=self.has_batch_norm)
        micro_batches = [MicroBatch.of(data.x_train, y, p) for p in batches.micro_batches(rows)]
        steps = [micro_batches] if self.accumulates else [[micro_batch] for micro_batch in micro_batches]
        losses = [self.run_step(feeds, step, 1).loss for step in steps]
        self.release()
        if self.accumulates:
            return losses[0]
        return float(np.average(losses, weights=[self.divisor(micro_batch.y, feeds) for micro_batch in micro_batches]))


class TrainerCache:
    """The training graph that was used last, which another runner's round usually needs again.

    A board doesn't `keep` it after training: the new model needs its memory, and loading it takes less than two steps.
    The subgraphs that were cut from it stay until another graph is used.
    """

    def __init__(self, threads: int = 1, *, keep: bool = False, cuda: bool = False) -> None:
        self.threads = threads
        self._cuda = cuda
        self._keep = keep
        self._loaded: tuple[tuple[str, Path | None], Trainer] | None = None
        self._subgraphs = ("", Subgraphs())

    def of(self, sha256: str, read: Callable[[], bytes], base: Path | None = None) -> Trainer:
        """A trainer for a graph and the frozen base that it reads; `read` gives its bytes if they are needed."""
        key = (sha256, base)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # two loaded models are more than a small board has memory for
            if self._subgraphs[0] != sha256:
                self._subgraphs = (sha256, Subgraphs())
            trainer = Trainer(read(), threads=self.threads, cuda=self._cuda, base=base, subgraphs=self._subgraphs[1])
            self._loaded = (key, trainer)
        return self._loaded[1]

    def predictor(self, model: Path) -> Predictor:
        """Open a staged model."""
        return Predictor(model, threads=self.threads, cuda=self._cuda)

    def release(self) -> None:
        """Unload the graph after a training, unless it is to be kept."""
        if not self._keep:
            self._loaded = None


RunGraph = Callable[[dict[str, Array], Sequence[str]], Mapping[str, Array]]  # takes feeds and names of outputs

# An old value so large that a batch's is negligible beside it: the share of it that is kept is exact to the last bit.
_HUGE_STATISTIC = np.float32(2.0**40)


def batch_norm_statistics(
    run: RunGraph,
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
    outputs = [step_contract.next_name(n) for n in names]
    zeros = {n: np.zeros_like(old[n]) for n in names}
    huge_outputs = run(
        {**feeds, **{n: np.full_like(v, _HUGE_STATISTIC) for n, v in zeros.items()}, step_contract.X: x[batches[0]]},
        outputs,
    )
    totals: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(old[n].shape, np.float64) for n in names}
    for rows in batches:
        outputs_of_batch = run({**feeds, **zeros, step_contract.X: x[rows]}, outputs)
        for name in names:
            totals[name] += np.asarray(outputs_of_batch[step_contract.next_name(name)], np.float64)
    result: Tensors = {}
    for name in names:
        huge_median = float(np.median(np.asarray(huge_outputs[step_contract.next_name(name)])))
        batch_share = 1.0 - huge_median / float(_HUGE_STATISTIC)
        mean = totals[name] / (len(batches) * batch_share) if batch_share > 0 else totals[name] * np.nan
        result[name] = np.asarray(mean if np.isfinite(mean).all() else old[name], np.float32)
    return result
