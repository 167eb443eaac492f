"""Measures global models on the server's own samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import step
from fedprune.recipe import Recipe
from fedprune.selection import Tensors
from fedprune.session import Session
from fedprune_device.labels import targets
from fedprune_device.losses import data_loss, hits
from fedprune_export.cut import at_widths
from fedprune_export.graph import Port
from fedprune_export.imported import Model

Evaluation = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Samples and labels of the server's own set, as `LocalData` has them."""

_BATCH = 256


class Evaluator:
    """Measures models of one architecture.

    Weights are inputs of its graph, so that one session serves every round.

    Args:
        model: The model; its weights are not used.
        recipe: The job's, for its loss.
        samples: The server's set.
    """

    def __init__(self, model: Model, recipe: Recipe, samples: Evaluation) -> None:
        self._model = model
        self._recipe = recipe
        self._x = samples[0]
        self._y = targets(samples[1], recipe.loss, model.architecture.classes)
        self._session: Session | None = None

    def __call__(self, weights: Tensors) -> dict[str, float]:
        """Accuracy, where classes are predicted, loss and number of samples; what isn't finite is left out."""
        recipe, session = self._recipe, self._opened()
        terms = {step.HUBER_DELTA: np.array(recipe.huber_delta)}
        right: list[npt.NDArray[np.bool_]] = []
        loss = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for at in range(0, len(self._x), _BATCH):
                labels = self._y[at : at + _BATCH]
                logits = session.run({step.X: self._x[at : at + _BATCH], **weights}, [step.LOGITS])[step.LOGITS]
                found = hits(recipe.loss, logits, labels)
                right += [] if found is None else [found]
                loss += data_loss(recipe.loss, logits, labels, terms) * len(labels)
        metrics = {"accuracy": float(np.mean(np.concatenate(right)))} if right else {}
        metrics |= {"loss": loss / len(self._x), "samples": float(len(self._x))}
        return {k: v for k, v in metrics.items() if math.isfinite(v)}

    def _opened(self) -> Session:
        if self._session is None:
            architecture = self._model.architecture
            graph = at_widths(self._model, architecture.sizes)
            graph.inputs += [Port(t.name, np.dtype(np.float32), t.shape) for t in architecture.tensors]
            self._session = Session(graph.to_bytes())
        return self._session
