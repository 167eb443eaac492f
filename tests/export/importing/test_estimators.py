"""Linear estimators of `ai.onnx.ml`: what is imported computes what onnxruntime computes of the file, and trains."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import import_onnx
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import distance, outputs

RANDOM = np.random.default_rng(0)
FEATURES = 4


def ml(op: str, inputs: list[str], outputs: list[str], **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=op.lower(), domain="ai.onnx.ml", **attrs)


def file_of(nodes: list[onnx.NodeProto], **sizes: int) -> bytes:
    """A file of these nodes from `x` to outputs of so many numbers; 0 is a label."""
    ports = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT if s else TensorProto.INT64, ["n", s] if s else ["n"])
        for n, s in sizes.items()
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    graph = helper.make_graph(nodes, "estimator", [x], ports)
    return helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()


def numbers(*shape: int) -> list[float]:
    return RANDOM.standard_normal(shape).ravel().tolist()


SCALER = ml("Scaler", ["x"], ["scaled"], offset=numbers(FEATURES), scale=numbers(FEATURES))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_scaled_logistic_regression_keeps_labels_and_probabilities(classes: int) -> None:
    weights, biases = numbers(classes, FEATURES), numbers(classes)
    if classes == 2:  # as skl2onnx writes two classes
        weights, biases = [-w for w in weights[:FEATURES]] + weights[:FEATURES], [-biases[0], biases[0]]
    attrs = {"coefficients": weights, "intercepts": biases, "classlabels_ints": [7, 1, 5][:classes]}
    end = "SOFTMAX" if classes == 3 else "LOGISTIC"
    classifier = ml("LinearClassifier", ["scaled"], ["label", "p"], post_transform=end, **attrs)
    normal = ml("Normalizer", ["p"], ["probabilities"], norm="L1")
    raw = file_of([SCALER, classifier, normal], label=0, probabilities=classes)

    model = import_onnx(raw, "net")

    x = RANDOM.standard_normal((6, FEATURES)).astype(np.float32)
    written = OnnxSession(onnx_file(model.graph, model.tensors, "net")).run({"x": x})
    expected = OnnxSession(raw).run({"x": x})
    assert distance(written["probabilities"], expected["probabilities"]) < 1e-5
    assert (written["label"] == expected["label"]).all()
    assert {t.shape for t in model.architecture.trainable} == {(classes, FEATURES), (classes,)}
    training_graph(model, Features())


def test_a_linear_regression_is_a_product() -> None:
    attrs = {"coefficients": numbers(2, FEATURES), "intercepts": numbers(2), "targets": 2}
    raw = file_of([SCALER, ml("LinearRegressor", ["scaled"], ["y"], **attrs)], y=2)
    model = import_onnx(raw, "net")
    x = RANDOM.standard_normal((6, FEATURES)).astype(np.float32)
    assert distance(outputs(model.graph, x), OnnxSession(raw).run({"x": x})["y"]) < 1e-5
    training_graph(model, Features(loss="mse"))


def test_decision_trees_are_refused_by_name() -> None:
    node = ml("TreeEnsembleRegressor", ["x"], ["y"], n_targets=1)
    with pytest.raises(
        ModelError, match="TreeEnsembleRegressor 'treeensembleregressor' is made of decision trees"
    ) as refusal:
        import_onnx(file_of([node], y=1), "net")
    assert refusal.value.hint
