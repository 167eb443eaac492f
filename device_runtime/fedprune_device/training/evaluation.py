"""Measures a board's models on its own samples, and checks a model before it serves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedprune.core.metrics import LOSS, METRICS, served_metrics
from fedprune.core.text import amount, quantity
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import LogitAdjustment, loss_terms
from fedprune_device.hardware.layer_timing import median_seconds
from fedprune_device.hardware.readings import peak_memory
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.objective import BatchMeasure, Objective
from fedprune_device.training.training_task import TrainingResult

PROBE_SAMPLES = 32  # local samples with which a new model is checked before it serves

# Samples that are predicted at once, if a training step takes as many: the planner counts a step's memory alone.
_MAX_BATCH = 64

_TIMED_PREDICTIONS = 7  # predictions of one sample that are timed in a round

# Metrics of a set that are not the mean of its samples' metrics.
_SET_METRICS = ("ap", "perplexity")

# Metrics that tell of the machine; all others are the same wherever an offer is carried out.
MACHINE_METRICS = frozenset(
    {"download_seconds", "evaluate_seconds", "train_seconds", "step_seconds", "latency_seconds", "peak_memory_bytes"}
)


class Evaluation:
    """Measures models of one round. `adjustment` adapts logits to the board's own labels; it is empty once a model is
    chosen that serves without it."""

    def __init__(
        self, data: LocalData, recipe: Recipe, classes: int, adjustment: LogitAdjustment, objective: Objective
    ) -> None:
        self._data = data
        self._recipe = recipe
        self._classes = classes
        self.adjustment = adjustment
        self._objective = objective
        self._batch = min(_MAX_BATCH, recipe.micro_batch, data.samples)
        self.metrics: dict[str, float] = {"samples_test": float(len(data.y_test))}
        if len(data.y_val):
            self.metrics["samples_validation"] = float(len(data.y_val))

    @property
    def has_samples(self) -> bool:
        """Whether there is anything to measure a model on."""
        return len(self._data.y_test) > 0 or len(self._data.y_val) > 0

    def measure(self, model: Predictor, when: str) -> None:
        """Measure a model `before` or `after` training, or the board's own `average`, on test samples alone."""
        began = time.monotonic()
        if self._measure_split(model, "test", when):
            self.metrics["evaluate_seconds"] = time.monotonic() - began
        if when != "average":
            self._measure_split(model, "val", "validation" if when == "after" else f"validation_{when}")

    def metric_per_sample(self, model: Predictor, adjustment: LogitAdjustment) -> npt.NDArray[np.float64]:
        """The recipe's metric of every validation sample on its own, signed so that more is better; NaN where a sample
        has none. The loss takes the place of a metric that judges sets."""
        judge = METRICS[self._recipe.judged_by]
        judge = LOSS if judge.name in _SET_METRICS else judge
        y, values = self._objective.targets(self._data.y_val), []
        for start in range(0, len(y), self._batch):
            outputs = adjustment(model.predict(self._data.x_val[start : start + self._batch], self._batch))
            labels = np.asarray(y[start : start + self._batch])
            for i in range(len(outputs)):
                measure = self._objective(outputs[i : i + 1], labels[i : i + 1])
                values.append(self._objective.metrics(measure).get(judge.name, math.nan))
        return np.array(values, np.float64) * (1 if judge.higher_is_better else -1)

    def check(self, model: Predictor, loss: float | None) -> None:
        """Check that a model may serve. `loss` is what the training graph computed for it on the first training
        samples; None where training and inference differ by design. Raises `ModelError`."""
        y = self._objective.targets(self._data.y_train)
        terms = loss_terms(y, self._recipe, self._classes)

        def outputs_loss(outputs: npt.NDArray[np.float32]) -> float:
            # In small batches, as the model predicts them.
            batches = [slice(s, s + self._batch) for s in range(0, min(len(y), PROBE_SAMPLES), self._batch)]
            labels = y[:PROBE_SAMPLES]
            return BatchMeasure.combine([self._objective(outputs[s], labels[s], terms) for s in batches]).loss

        expected = None if loss is None else (loss, outputs_loss)
        model.check(self._classes, self._data.x_train[:PROBE_SAMPLES], expected, batch=self._batch)

    def measure_latency(self, model: Predictor) -> None:
        """Median time of predicting one sample; the first prediction allocates and doesn't count."""
        self.metrics["latency_seconds"] = median_seconds(
            lambda: model.predict(self._data.x_train[:1]), total_s=math.inf, max_runs=_TIMED_PREDICTIONS
        )

    def finite_metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}

    def _measure_split(self, model: Predictor, split: str, name: str) -> bool:
        """Loss, accuracy where classes are predicted, and the recipe's metric on one split, if it has samples."""
        x, y = getattr(self._data, f"x_{split}"), getattr(self._data, f"y_{split}")
        if not len(y):
            return False
        y, measures = self._objective.targets(y), []
        for start in range(0, len(y), self._batch):  # outputs may take more memory than samples
            batch = slice(start, start + self._batch)
            measures.append(self._objective(self.adjustment(model.predict(x[batch], self._batch)), y[batch]))
        self.metrics |= {f"{k}_{name}": v for k, v in self._objective.metrics(BatchMeasure.combine(measures)).items()}
        return True


def is_clearly_better(values: npt.NDArray[np.float64], other_values: npt.NDArray[np.float64]) -> bool:
    """Whether one model's values of samples are better than another's by more than one standard error. If the mean of
    the differences is 0, the standard error of their sum is the root of the sum of their squares. So one sample alone
    decides nothing; of the samples that only one of the models gets right, it takes 2 to 0 or 4 to 1."""
    gains = values - other_values
    gains = gains[np.isfinite(gains)]
    return float(gains.sum()) > math.sqrt(float(np.square(gains).sum()))


def training_metrics(result: TrainingResult) -> dict[str, float]:
    accuracy = {} if result.train_accuracy is None else {"train_accuracy": result.train_accuracy}
    return accuracy | {
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "train_seconds": result.seconds,
        "step_seconds": result.step_seconds,
        "peak_memory_bytes": peak_memory(),
    }


def metrics_text(metrics: Mapping[str, float]) -> str:
    """What a training took and what its model scores, for people; the rest of a phrase that begins with `trained`."""
    units = {
        "train_seconds": ("s", "in "),
        "step_seconds": ("s", "a step in "),
        "peak_memory_bytes": ("bytes", "at most "),
    }
    costs = [how + amount(metrics[name], unit) for name, (unit, how) in units.items() if name in metrics]
    scores = []
    for name, value in served_metrics(metrics).items():
        before = metrics.get(f"{name}_before")
        change = "" if before is None else f" ({METRICS[name].value_text(before)} before)"
        scores.append(METRICS[name].titled_value(value) + change)
    test = f" on {quantity(int(metrics.get('samples_test', 0)), 'test sample')}" if scores else ""
    return f"{', '.join(costs)}; {', '.join(scores) or 'no test samples'}{test}"
