"""Loads the server's own samples, and measures global models and submodels on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, ModelError
from fedprune.model import step_contract
from fedprune.model.lengths import Shape, with_lengths
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.training.objective import BatchMeasure, Objective
from fedprune_export.ir.graph import Port
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step

# Inputs and labels, as `LocalData` has them.
LabelledSamples = tuple[npt.NDArray[Any], npt.NDArray[Any]]

_BATCH_SIZE = 256


def check_samples(samples: LabelledSamples) -> None:
    """Check that there are samples to measure on. Raises `ConfigError` if there are none, or too few labels."""
    x, y = samples
    if not 0 < len(x) == len(y):
        raise ConfigError(
            "samples to measure on", expected="one or more, each with a label", got=f"{len(x)}, and {len(y)} labels"
        )


class ModelSessions:
    """Sessions of one model, by widths.

    Weights are inputs of its graphs, so that one session serves every round. Widths may be others in every round, where
    a strategy changes them: only the sessions that were used last stay open.

    Args:
        model: The model; its weights are not used.
        max_open: How many stay open.
    """

    def __init__(self, model: Model, max_open: int) -> None:
        self.model = model
        self._max_open = max_open
        self._opened: dict[tuple[int, ...], OnnxSession] = {}

    def session_at(self, widths: tuple[int, ...]) -> OnnxSession:
        session = self._opened.pop(widths, None)
        if session is None:
            while len(self._opened) >= self._max_open:
                del self._opened[next(iter(self._opened))]  # the one that was asked for longest ago
            graph = at_widths(self.model, widths)
            shapes = self.model.architecture.shapes(widths)
            # As inputs, not constants: a session takes long to make, and weights change every round.
            graph.inputs += [Port(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
            session = OnnxSession(graph.to_bytes())
        self._opened[widths] = session
        return session


class Evaluator:
    """Measures models of one architecture, and their submodels, on samples.

    Args:
        recipe: The job's, for its loss.

    Raises:
        ConfigError: There are no samples, or not as many labels.
        DataError: The labels are not what the loss takes.
    """

    def __init__(self, sessions: ModelSessions, recipe: Recipe, samples: LabelledSamples) -> None:
        check_samples(samples)
        self._sessions = sessions
        model = sessions.model
        graph = training_step(model, recipe.features).to_bytes()
        self._objective = Objective(graph, recipe, model.architecture.classes, scores=recipe.features.counts_hits)
        self._x, self._y = samples[0], self._objective.targets(samples[1])

    def __call__(self, weights: Tensors, widths: tuple[int, ...]) -> dict[str, float]:
        """Measure loss, accuracy where classes are predicted, the recipe's metric, and the number of samples.

        Values that are not finite are left out.

        Args:
            weights: The tensors of a model or submodel.
        """
        session, measures = self._sessions.session_at(widths), list[BatchMeasure]()
        kept_weights = session.keep(weights)
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for start in range(0, len(self._x), _BATCH_SIZE):
                feeds = {step_contract.X: self._x[start : start + _BATCH_SIZE]}
                logits = session.run(feeds, [step_contract.LOGITS], kept_feeds=kept_weights)[step_contract.LOGITS]
                measures.append(self._objective(logits, self._y[start : start + _BATCH_SIZE]))
        return {"samples": float(len(self._x)), **self._objective.metrics(BatchMeasure.combine(measures))}


def load_evaluation(source: str, model: Model, recipe: Recipe) -> LabelledSamples:
    """The server's own samples: `x_test` and `y_test` where a file has them, else all samples.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model that will be measured.

    Raises:
        DataError: The data can't be read or doesn't fit the model.
    """
    data = load_data(source)
    try:
        data = fit_data(data, model, recipe)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if len(data.y_test) and _has_test_split(Path(source)):
        return np.asarray(data.x_test), np.asarray(data.y_test)
    if not len(data.y_test):
        return np.asarray(data.x_train), np.asarray(data.y_train)
    return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])


def fit_data(data: LocalData, model: Model, recipe: Recipe) -> LocalData:
    """Check samples and labels against a model; returns them in the form that the model takes. Raises `DataError` if
    labels don't fit the loss or the number of classes, or samples have another shape or type."""
    architecture = model.architecture
    label_port = next(p for p in training_step(model, recipe.features).inputs if p.name == step_contract.Y)
    shape = tuple(d if isinstance(d, int) else None for d in label_port.shape[1:])
    targets = Targets.of(recipe, architecture.classes, shape, whole_numbers=label_port.dtype.kind == "i")
    data = data.snapshot(_shape(model), targets)
    data.check(targets, _shape(model), token_ids=_takes_token_ids(model))
    return data


def load_calibration(source: str, model: Model) -> npt.NDArray[Any]:
    """Samples for batch-norm statistics: `x_test` where the source has it, else all of `x`; labels are not needed.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model whose statistics will be measured.

    Raises:
        DataError: The samples can't be read or don't fit the model.
    """
    return np.asarray(load_inputs(source, _shape(model), token_ids=_takes_token_ids(model)))


def _shape(model: Model) -> Shape:
    return with_lengths(model.architecture.input_shape, model.graph.metadata, ModelError)


def _takes_token_ids(model: Model) -> bool:
    return model.graph.inputs[0].dtype.kind == "i"


def _has_test_split(path: Path) -> bool:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return "x_test" in file.files
    except Exception:  # noqa: BLE001 - a damaged file raises anything; the reader of the samples reports it
        return False
