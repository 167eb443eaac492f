"""Measuring models: which sessions stay open, and on what nothing can be measured."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_server.executor.evaluator import Evaluator, ModelSessions
from support.fakes.digits_simulation import digits_simulation


def test_only_the_sessions_that_were_asked_for_last_stay_open(model: Model) -> None:
    sessions = ModelSessions(model, max_open=3)
    sizes = model.architecture.sizes
    full_session = sessions.session_at(sizes)
    session_refs = []
    for last in range(1, 6):  # a strategy that chooses anew in every round
        session_refs.append(weakref.ref(sessions.session_at((*sizes[:-1], last))))
        assert sessions.session_at(sizes) is full_session
    gc.collect()
    assert [session() is not None for session in session_refs] == [False, False, False, True, True]


@pytest.mark.parametrize(("inputs", "labels"), [(0, 0), (3, 2), (0, 3)])
def test_nothing_is_measured_on_no_samples_or_without_labels(
    model: Model, tmp_path: Path, inputs: int, labels: int
) -> None:
    samples = np.zeros((inputs, 1, 8, 8), np.float32), np.zeros(labels, np.int64)
    with pytest.raises(ConfigError, match=f"samples to measure on.*got {inputs}, and {labels} labels"):
        Evaluator(ModelSessions(model, 1), Recipe(), samples)
    # An experiment that is made from Python says so before it begins.
    with pytest.raises(ConfigError, match="samples to measure on"):
        digits_simulation(tmp_path, evaluation=samples)


def test_token_ids_of_64_bits_are_measured_on_a_model_of_32() -> None:
    graph = Graph(inputs=[Port("ids", np.dtype(np.int32), ("N", 4))])
    graph.initializers |= {"table": np.ones((9, 5), np.float32), "w": np.ones((5, 3), np.float32)}
    words = graph.emit("ReduceMean", graph.emit("Gather", "table", "ids"), attrs={"axes": [1], "keepdims": 0})
    graph.outputs = [Port(graph.emit("Gemm", words, "w"), np.dtype(np.float32), ("N", 3))]
    model = import_onnx(graph.to_bytes(), "words")
    samples = np.arange(8).reshape(2, 4), np.array([0, 1])
    measures = Evaluator(ModelSessions(model, 1), Recipe(), samples)(model.tensors, widths_at(model.architecture, 1))
    assert measures["samples"] == 2
    with pytest.raises(DataError):
        Evaluator(ModelSessions(model, 1), Recipe(), (samples[0] + 2**33, samples[1]))
