"""The loss and metrics of a model's outputs, computed by the part of its training graph that follows them."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import divisor_share, first_step_feeds
from fedprune.runtime.onnx_subgraph import Subgraphs, metadata_of, subgraph_for
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.labels import Targets

Array = npt.NDArray[Any]


class BatchMeasure(NamedTuple):
    """A batch's loss, its weight among other batches' losses, and the number of right labels and of all labels.

    `hits` is None where numbers are predicted, of which none is right or wrong; `sums` [k] (float64) are those of the
    recipe's metric, if it has one.
    """

    loss: float
    weight: float
    hits: int | None
    labels: int
    sums: npt.NDArray[np.float64] | None = None

    @property
    def accuracy(self) -> float | None:
        return None if self.hits is None or not self.labels else self.hits / self.labels

    @classmethod
    def combine(cls, measures: Sequence[BatchMeasure]) -> BatchMeasure:
        """The combined result of a set's parts, of which there is at least one."""
        weight = sum(m.weight for m in measures)
        loss = sum(m.loss * m.weight for m in measures) / weight if weight else math.nan
        hits = None if measures[0].hits is None else sum(m.hits or 0 for m in measures)
        sums = [m.sums for m in measures if m.sums is not None]
        return cls(loss, weight, hits, sum(m.labels for m in measures), np.sum(sums, axis=0) if sums else None)


class _Metric:
    """The metric in a training graph's metadata."""

    def __init__(self, text: str) -> None:
        try:
            graph = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ModelError("the training graph's metric", expected="an ONNX file in base64") from error
        self._sums = OnnxSession(subgraph_for(graph, [step_contract.SUMS]))
        self._value = OnnxSession(subgraph_for(graph, [step_contract.VALUE], given_values=[step_contract.SUMS]))

    def sums(self, outputs: npt.NDArray[np.float32], labels: Array) -> npt.NDArray[np.float64]:
        feeds = {step_contract.LOGITS: outputs, step_contract.Y: labels}
        results = self._sums.run({n: v for n, v in feeds.items() if n in self._sums.inputs}, [step_contract.SUMS])
        return results[step_contract.SUMS].astype(np.float64)

    def value(self, sums: npt.NDArray[np.float64]) -> float:
        results = self._value.run({step_contract.SUMS: sums.astype(np.float32)}, [step_contract.VALUE])
        return float(results[step_contract.VALUE])


class Objective:
    """The part of a training graph after the model's outputs, loaded on its own; `scores` tells whether it counts right
    labels, `subgraphs` are those of this graph that were cut before. Raises `ModelError` if it is not a training graph.
    """

    def __init__(
        self, graph: bytes, recipe: Recipe, classes: int, *, scores: bool, subgraphs: Subgraphs | None = None
    ) -> None:
        outputs = [step_contract.LOSS, step_contract.HITS] if scores else [step_contract.LOSS]
        subgraphs = subgraphs or Subgraphs()
        self._session = OnnxSession(subgraphs.subgraph_for(lambda: graph, outputs, given_values=[step_contract.LOGITS]))
        self._outputs, self._recipe, self._classes = outputs, recipe, classes
        text = metadata_of(graph).get(step_contract.METRIC_METADATA)
        self._metric = _Metric(text) if recipe.metric and text is not None else None
        kind, shape = self._session.inputs[step_contract.Y]
        # Public: callers convert labels with it once, and not for every batch.
        self.targets = Targets.of(recipe, classes, shape[1:], whole_numbers=kind == "tensor(int64)")

    def __call__(
        self, outputs: npt.NDArray[np.float32], y: Array, terms: Mapping[str, Array] | None = None
    ) -> BatchMeasure:
        """Measure outputs [n, ...] against labels as `targets` gives them. `terms` are those of the training
        (`labels.loss_terms`); without them all classes count alike, nothing is added to the logits, and labels are not
        smoothed."""
        labels = y.astype(np.int64, copy=False) if y.dtype.kind in "iu" else y
        inputs, ignored = self._session.inputs, self._recipe.ignore_label
        feeds = first_step_feeds(self._recipe, {}, inputs, labels, self._classes)
        if step_contract.LABEL_SMOOTHING in feeds:
            feeds[step_contract.LABEL_SMOOTHING] = np.array(0, np.float32)
        if terms is not None:
            feeds |= {n: v for n, v in terms.items() if n in inputs}
        scores = step_contract.HITS in self._outputs
        weight = divisor_share(labels, ignored, feeds.get(step_contract.CLASS_WEIGHT)) if scores else float(len(labels))
        if step_contract.DIVISOR in feeds:
            feeds[step_contract.DIVISOR] = np.array(weight or 1.0, np.float32)
        results = self._session.run({**feeds, step_contract.LOGITS: outputs, step_contract.Y: labels}, self._outputs)
        hits = int(results[step_contract.HITS]) if step_contract.HITS in results else None
        sums = None if self._metric is None else self._metric.sums(outputs, labels)
        return BatchMeasure(float(results[step_contract.LOSS]), weight, hits, self.targets.count(labels), sums)

    def metrics(self, measure: BatchMeasure) -> dict[str, float]:
        """Loss, accuracy and the recipe's metric, as far as they are defined for these samples and finite."""
        metrics = {"loss": measure.loss if measure.weight else math.nan}
        if measure.accuracy is not None:
            metrics["accuracy"] = measure.accuracy
        if self._metric is not None and measure.sums is not None:
            metrics[self._recipe.judged_by] = self._metric.value(measure.sums)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
