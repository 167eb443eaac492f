"""Measures global models and their submodels on the server's samples: loss, accuracy and the recipe's metric."""

from __future__ import annotations

import numpy as np

from fedprune.model import step_contract
from fedprune.model.input_type import InputType
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.runtime.session import OnnxSession
from fedprune_device.training.objective import BatchMeasure, Objective
from fedprune_export.ir.graph import Port
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step
from fedprune_server.executor.server_samples import LabelledSamples, check_samples

_BATCH_SIZE = 256


class ModelSessions:
    """Opens an inference session for each widths of a model, and keeps the last `max_open` of them open.

    Weights are inputs of the graphs, not constants, so that a session serves every round: making one takes long.
    A strategy may change widths in every round. The weights of `model` are not used.
    """

    def __init__(self, model: Model, max_open: int) -> None:
        self.model = model
        self._max_open = max_open
        self._opened: dict[tuple[int, ...], OnnxSession] = {}

    def session_at(self, widths: tuple[int, ...]) -> OnnxSession:
        session = self._opened.pop(widths, None)
        if session is None:
            while len(self._opened) >= self._max_open:
                del self._opened[next(iter(self._opened))]  # the least recently used one
            graph = at_widths(self.model, widths)
            shapes = self.model.architecture.shapes(widths)
            # As inputs, not constants: a session takes long to make, and weights change every round.
            graph.inputs += [Port(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
            session = OnnxSession(graph.to_bytes())
        self._opened[widths] = session
        return session


class Evaluator:
    """Measures models of one architecture, and their submodels, on samples, with the loss and metric of a recipe.

    Raises `ConfigError` if there are no samples, or not as many labels, and `DataError` if the model can't take the
    samples, or its loss the labels.
    """

    def __init__(self, sessions: ModelSessions, recipe: Recipe, samples: LabelledSamples) -> None:
        check_samples(samples)
        self._sessions = sessions
        model = sessions.model
        graph = training_step(model, recipe.features).to_bytes()
        self._objective = Objective(graph, recipe, model.architecture.classes, scores=recipe.features.counts_hits)
        self._x = InputType(model.graph.inputs[0].dtype).convert(samples[0])
        self._y = self._objective.targets(samples[1])

    def __call__(self, weights: Tensors, widths: tuple[int, ...]) -> dict[str, float]:
        """Measure loss, accuracy where classes are predicted, the recipe's metric, and the number of samples.

        Values that are not finite are left out.
        """
        session, measures = self._sessions.session_at(widths), list[BatchMeasure]()
        kept_weights = session.keep(weights)
        with np.errstate(over="ignore", invalid="ignore"):  # a diverged model has no loss, and that is no error
            for start in range(0, len(self._x), _BATCH_SIZE):
                feeds = {step_contract.X: self._x[start : start + _BATCH_SIZE]}
                logits = session.run(feeds, [step_contract.LOGITS], kept_feeds=kept_weights)[step_contract.LOGITS]
                measures.append(self._objective(logits, self._y[start : start + _BATCH_SIZE]))
        return {"samples": float(len(self._x)), **self._objective.metrics(BatchMeasure.combine(measures))}
