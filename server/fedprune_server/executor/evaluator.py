"""Measures global models, and submodels of theirs, on samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.session import Session
from fedprune_device.data.labels import data_loss, hits, targets
from fedprune_export.ir.graph import Port
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

Evaluation = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Inputs and labels, as `LocalData` has them."""

_BATCH = 256


def check_samples(samples: Evaluation) -> None:
    """Whether models can be measured on these.

    Raises:
        ConfigError: There are none, or not as many labels as inputs.
    """
    x, y = samples
    if not 0 < len(x) == len(y):
        raise ConfigError(
            "samples to measure on", expected="one or more, each with a label", got=f"{len(x)}, and {len(y)} labels"
        )


class Sessions:
    """Sessions of one model, by widths.

    Weights are inputs of its graphs, so that one session serves every round. Widths may be others in every round, where
    a strategy changes them: only the sessions that were used last stay open.

    Args:
        model: The model; its weights are not used.
        most: How many stay open.
    """

    def __init__(self, model: Model, most: int) -> None:
        self.model = model
        self._most = most
        self._opened: dict[tuple[int, ...], Session] = {}

    def at(self, widths: tuple[int, ...]) -> Session:
        """The session at some widths."""
        session = self._opened.pop(widths, None)
        if session is None:
            while len(self._opened) >= self._most:
                del self._opened[next(iter(self._opened))]  # the one that was asked for longest ago
            graph = at_widths(self.model, widths)
            shapes = self.model.architecture.shapes(widths)
            graph.inputs += [Port(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
            session = Session(graph.to_bytes())
        self._opened[widths] = session
        return session


class Evaluator:
    """Measures models of one architecture, and their submodels, on samples.

    Args:
        sessions: The architecture's.
        recipe: The job's, for its loss.
        samples: Inputs and labels.

    Raises:
        ConfigError: There are no samples, or not as many labels.
        DataError: The labels are not what the loss takes.
    """

    def __init__(self, sessions: Sessions, recipe: Recipe, samples: Evaluation) -> None:
        check_samples(samples)
        self._sessions = sessions
        self._recipe = recipe
        self._x = samples[0]
        self._y = targets(samples[1], recipe.loss, sessions.model.architecture.classes)

    def __call__(self, weights: Tensors, widths: tuple[int, ...]) -> dict[str, float]:
        """Accuracy, where classes are predicted, loss and number of samples; what isn't finite is left out.

        Args:
            weights: The tensors of a model or submodel.
            widths: Its widths.
        """
        recipe, session = self._recipe, self._sessions.at(widths)
        terms = {step_contract.HUBER_DELTA: np.array(recipe.huber_delta)}
        right: list[npt.NDArray[np.bool_]] = []
        loss = 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for at in range(0, len(self._x), _BATCH):
                labels = self._y[at : at + _BATCH]
                logits = session.run({step_contract.X: self._x[at : at + _BATCH], **weights}, [step_contract.LOGITS])[
                    step_contract.LOGITS
                ]
                found = hits(recipe.loss, logits, labels)
                right += [] if found is None else [found]
                loss += data_loss(recipe.loss, logits, labels, terms) * len(labels)
        metrics = {"accuracy": float(np.mean(np.concatenate(right)))} if right else {}
        metrics |= {"loss": loss / len(self._x), "samples": float(len(self._x))}
        return {k: v for k, v in metrics.items() if math.isfinite(v)}
