"""The loss and score of a model's outputs, as its training graph computes them from there on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import first_step, weight_of
from fedprune.runtime.onnx_subgraph import part_for
from fedprune.runtime.session import Session
from fedprune_device.data.labels import Targets

Array = npt.NDArray[Any]


class Measure(NamedTuple):
    """A loss, what it weighs among other batches' losses, and how many of how many labels are right.

    `hits` is None where numbers are predicted, of which none is right or wrong.
    """

    loss: float
    weight: float
    hits: int | None
    labels: int

    @property
    def accuracy(self) -> float | None:
        """Share of right labels."""
        return None if self.hits is None or not self.labels else self.hits / self.labels

    @classmethod
    def of(cls, parts: Sequence[Measure]) -> Measure:
        """What the parts of a set give together; at least one."""
        weight = sum(m.weight for m in parts)
        loss = sum(m.loss * m.weight for m in parts) / weight if weight else math.nan
        hits = None if parts[0].hits is None else sum(m.hits or 0 for m in parts)
        return cls(loss, weight, hits, sum(m.labels for m in parts))


class Objective:
    """What of a training graph follows the model's outputs, loaded on its own.

    Args:
        graph: The training graph.
        scores: Whether it counts right labels.

    Raises:
        ModelError: It is not a training graph.
    """

    def __init__(self, graph: bytes, recipe: Recipe, classes: int, *, scores: bool) -> None:
        outputs = [step_contract.LOSS, step_contract.HITS] if scores else [step_contract.LOSS]
        self._session = Session(part_for(graph, outputs, given=[step_contract.LOGITS]))
        self._outputs, self._recipe, self._classes = outputs, recipe, classes
        kind, shape = self._session.inputs[step_contract.Y]
        self.targets = Targets.of(recipe, classes, shape[1:], whole=kind == "tensor(int64)")
        """The labels that it takes."""

    def __call__(self, outputs: npt.NDArray[np.float32], y: Array, terms: Mapping[str, Array] | None = None) -> Measure:
        """Measure outputs [n, ...] against labels as `targets` gives them.

        `terms` are those of the training (`labels.loss_terms`); without them all classes count alike, nothing is added
        to the logits, and labels are not smoothed.
        """
        labels = y.astype(np.int64, copy=False) if y.dtype.kind in "iu" else y
        inputs, ignored = self._session.inputs, self._recipe.ignore_label
        feeds = first_step(self._recipe, {}, inputs, labels, self._classes)
        if step_contract.LABEL_SMOOTHING in feeds:
            feeds[step_contract.LABEL_SMOOTHING] = np.array(0, np.float32)
        if terms is not None:
            feeds |= {n: v for n, v in terms.items() if n in inputs}
        scores = step_contract.HITS in self._outputs
        weight = weight_of(labels, ignored, feeds.get(step_contract.CLASS_WEIGHT)) if scores else float(len(labels))
        if step_contract.DIVISOR in feeds:
            feeds[step_contract.DIVISOR] = np.array(weight or 1.0, np.float32)
        if step_contract.Y_PARTNER in inputs:
            feeds[step_contract.Y_PARTNER] = labels
        found = self._session.run({**feeds, step_contract.LOGITS: outputs, step_contract.Y: labels}, self._outputs)
        hits = int(found[step_contract.HITS]) if step_contract.HITS in found else None
        return Measure(float(found[step_contract.LOSS]), weight, hits, self.targets.count(labels))
