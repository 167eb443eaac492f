"""Batch-norm statistics of the global model, measured again on a few unlabelled samples of the server.

Devices of different widths measure statistics of different sums: a channel that is fed by half of the channels before
it has another mean and variance than in the whole model. Their average fits no width, and least of all the whole model
(HeteroFL, Diao et al. 2021, re-estimates statistics, too). One forward pass in training mode over samples like the
devices' puts that right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.random_inputs import RandomInputs
from fedprune.model.selection import Tensors
from fedprune.model.trainable import frozen_tensors
from fedprune.runtime.session import OnnxSession
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

# All samples go through the model in one batch, so that the statistics are exactly theirs.
MAX_SAMPLES = 512


class Calibration:
    """Measures the batch-norm statistics of a model on fixed samples; call it with the model's tensors. Only the
    architecture and graph of `model` are used, not its weights. Raises `DataError` if there are fewer than two samples,
    or they have another shape than the model's input.

    Samples `x` are as the model takes them, in any order; of more than `MAX_SAMPLES`, evenly spaced ones are used
    (`samples`). Statistics of parts that are frozen (by the job's `features`) stay as they are."""

    def __init__(self, model: Model, x: npt.NDArray[Any], features: Features) -> None:
        shape = tuple(model.architecture.input_shape)
        if x.ndim == 0 or x.shape[1:] != shape or len(x) < 2:
            raise DataError("calibration samples", expected=shape_text("2 or more", *shape), got=shape_text(*x.shape))
        # The order decides the last bits of a mean, so it must not depend on how a file was read.
        rows = np.array(sorted(range(len(x)), key=lambda i: x[i].tobytes()))
        sample_rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_SAMPLES)).astype(np.int64)]
        self.samples = np.ascontiguousarray(x[sample_rows])
        frozen = frozen_tensors(model.architecture, features, model.frozen)
        self._trained = [t.name for t in model.architecture.trainable if t.name not in frozen]
        self._statistics = [t.name for t in model.architecture.statistics if t.name not in frozen]
        graph = model.graph.copy()
        for node in graph.nodes:
            if node.op == "BatchNormalization":
                node.attrs["momentum"] = 0.0  # nothing of the old statistics is kept, only the batch's are taken
        batch_graph = training_graph(replace(model, graph=graph), features.of_task)
        labels = next(p for p in batch_graph.inputs if p.name == step_contract.Y)
        self._y = np.zeros((len(sample_rows), *(d for d in labels.shape[1:] if isinstance(d, int))), labels.dtype)
        self._session = OnnxSession(batch_graph.to_bytes(), training=True)

    def __call__(self, tensors: Tensors) -> Tensors:
        """The same model with statistics of these samples; weights stay as they are, bit for bit. Raises `ModelError`
        if an operator fails."""
        if not self._statistics:
            return tensors
        feeds = dict(tensors) | {step_contract.momentum_name(n): np.zeros_like(tensors[n]) for n in self._trained}
        # No statistic depends on a number of the optimiser or the loss, such as the learning rate or Huber's delta.
        numbers = (name for name, (_, shape) in self._session.inputs.items() if not shape and name not in feeds)
        feeds |= dict.fromkeys(numbers, np.zeros((), np.float32))
        feeds |= {step_contract.X: self.samples, step_contract.Y: self._y}
        feeds |= {n: np.zeros_like(tensors[n]) for n in self._statistics}
        feeds |= RandomInputs.of(self._session.inputs, self._session.metadata).means(feeds, len(self.samples))
        measured = self._session.run(feeds, [step_contract.next_name(n) for n in self._statistics])
        return dict(tensors) | {n: measured[step_contract.next_name(n)] for n in self._statistics}
