"""One local training: its steps on batches of local samples, with mixup, ordered dropout and early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, DivergedError, TrainingError
from fedprune.core.median import median
from fedprune.core.rng import keyed_generator
from fedprune.model import step_contract
from fedprune.model.lengths import free_axis
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.selection import Tensors
from fedprune_device.data.batches import Batches, MicroBatch, Rows, even_chunks
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.step_graph import StepGraph
from fedprune_device.training.training_task import TrainingResult, TrainingTask

Array = npt.NDArray[Any]


class EarlyStopping:
    """Ends training after `epochs` epochs without a lower validation loss, and keeps the best weights with their
    `steps`."""

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


class TrainingRun:
    """A training in progress: the inputs of its steps, the arrays that they write into, and the losses so far."""

    def __init__(self, graph: StepGraph, tensors: Mapping[str, Array], data: LocalData, task: TrainingTask) -> None:
        recipe, classes = task.recipe, task.classes
        self._graph, self._data, self._task, self._names = graph, data, task, tuple(tensors)
        graph.check(tensors)
        self._targets = graph.targets(recipe, classes)
        data.check(self._targets, graph.input_shape, input_type=graph.input_type)
        self._y = self._targets(data.y_train)
        self._constants = graph.constant_inputs(tensors, self._y, recipe, classes, task.mask)
        self._constants |= {step_contract.drift_name(n): v for n, v in task.drift.items()}
        # Copies, because steps write into them.
        start = {**tensors, **{n: task.moments.get(n, np.float32(0)) for n in graph.optimizer_states}}
        shapes = {n: tensors[n.partition("::")[0]].shape for n in start}
        self._state: dict[str, Array] = {n: graph.empty_array("state", n, shape) for n, shape in shapes.items()}
        for name, value in start.items():
            np.copyto(self._state[name], value)
        # A step's outputs are written here: among the activations in onnxruntime's arena they would make it grow.
        self._spare = {n: graph.empty_array("next state", n, shapes[n]) for n in graph.updated_names}
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
        own_widths = widths = self._width_plans[0]
        if len(self._width_plans) > 1:  # ordered dropout draws the widths of each step
            generator = keyed_generator(task.seed, task.round, task.device, "widths", number)
            widths = self._width_plans[int(generator.integers(len(self._width_plans)))]
        narrower_axes = None if widths == own_widths else graph.axes
        if narrower_axes is not None:
            feeds = narrower_axes.narrow(feeds, own_widths, widths)
        gradient_names = graph.gradients if recipe.report_squares and self._ends_epoch(number) else []
        spare = self._spare if narrower_axes is None else None
        draw_key = (task.seed, task.round, task.device, "dropout", number)
        loss, hits, values, gradients = graph.run_step(
            feeds, micro_batches, task.optimizer_steps + number, gradient_names, spare, draw_key
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
            step_seconds=median(self._step_times),
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
        # Whole numbers can't be averaged, nor samples of different lengths.
        if not recipe.mixes_samples or graph.input_type.is_whole or free_axis(graph.input_shape) is not None:
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

    def _validation_loss(self, feeds: dict[str, Array]) -> float | None:
        """Data loss of the validation samples, as a step sees it (batch norm takes their statistics), but unscaled;
        None if the training samples lack the classes of all of them, so that they weigh nothing."""
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
