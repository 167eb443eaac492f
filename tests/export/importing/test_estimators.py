"""Estimators of `ai.onnx.ml`: a scaled network computes what onnxruntime computes of the file; others are refused."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import distance, outputs

RANDOM = np.random.default_rng(0)
FEATURES = 4


def ml(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=op.lower(), domain="ai.onnx.ml", **attrs)


def file_of(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray[Any, Any]], **sizes: int) -> bytes:
    """A file of these nodes from `x` to outputs of so many numbers."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in sizes.items()]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "estimator", [x], ports, tensors)
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def numbers(*shape: int) -> list[float]:
    return RANDOM.standard_normal(shape).ravel().tolist()


SCALER = ml("Scaler", ["x"], ["scaled"], offset=numbers(FEATURES), scale=numbers(FEATURES))


def test_a_scaled_network_has_the_numbers_of_its_file() -> None:
    nodes = [SCALER, helper.make_node("Gemm", ["scaled", "w", "b"], ["y"])]
    weights = {"w": RANDOM.standard_normal((FEATURES, 2)), "b": RANDOM.standard_normal(2)}
    raw = file_of(nodes, weights, y=2)
    model = import_onnx(raw, "net")
    x = RANDOM.standard_normal((6, FEATURES)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    # Boards don't train the scaler.
    assert {t.name for t in model.architecture.trainable} == {"w", "b"}
    training_graph(model, Features(loss="mse"))


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("LinearRegressor", {"coefficients": numbers(2, FEATURES), "intercepts": numbers(2), "targets": 2}),
        ("TreeEnsembleRegressor", {"n_targets": 1}),
    ],
)
def test_other_estimators_are_refused_by_name(op: str, attrs: dict[str, Any]) -> None:
    """The model that the hint names is a linear one, too: a product like that of the test above."""
    with pytest.raises(ModelError, match=f"{op} '{op.lower()}' is an estimator") as refusal:
        import_onnx(file_of([ml(op, ["x"], ["y"], **attrs)], {}, y=1), "net")
    assert "MLPRegressor" in str(refusal.value)
