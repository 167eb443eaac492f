"""Linear models as scikit-learn's exporter writes them are trained, and tell their labels by name."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import X
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import import_onnx, linear_models

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
ML = "ai.onnx.ml"
NAMES = ["ant", "bee", "cat"]


def linear_file(op: str, outputs: dict[str, int], rows: int = 3, **attributes: Any) -> bytes:
    rng = np.random.default_rng(rows)
    scaled = {"offset": rng.standard_normal(6).tolist(), "scale": rng.uniform(1, 2, 6).tolist()}
    sums = {"coefficients": rng.standard_normal(rows * 6).tolist(), "intercepts": rng.standard_normal(rows).tolist()}
    nodes = [
        helper.make_node("Scaler", ["image"], ["scaled"], domain=ML, **scaled),
        helper.make_node(op, ["scaled"], list(outputs), name="linear", domain=ML, **sums, **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("image", FLOAT, [None, 6])],
        [helper.make_tensor_value_info(n, t, [None] if t != FLOAT else [None, rows]) for n, t in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 1)]
    raw: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    onnx.checker.check_model(raw)
    return raw


CLASSIFIERS: dict[str, dict[str, Any]] = {
    "softmax of names": {"classlabels_strings": NAMES, "post_transform": "SOFTMAX"},
    "softmax of numbers": {"classlabels_ints": [10, 20, 30], "post_transform": "SOFTMAX"},
    "logistic": {"classlabels_strings": NAMES, "post_transform": "LOGISTIC"},
    "scores": {"classlabels_ints": [0, 1, 2]},
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_trained_and_tells_its_labels(name: str) -> None:
    attributes = CLASSIFIERS[name]
    label = STRING if "classlabels_strings" in attributes else INT64
    raw = linear_file("LinearClassifier", {"label": label, "shares": FLOAT}, **attributes)
    model = import_onnx(raw, "model")
    assert {n: v.shape for n, v in model.tensors.items()} == {"linear.weight": (3, 6), "linear.bias": (3,)}
    assert model.class_names == (tuple(NAMES) if label == STRING else ())
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    expected = OnnxSession(raw).run({"image": x})
    written = OnnxSession(onnx_file(model.graph, model.tensors, "model")).run({X: x})
    np.testing.assert_array_equal(written["label"], expected["label"])
    np.testing.assert_allclose(written["shares"], expected["shares"], rtol=1e-5, atol=1e-6)


def test_a_regression_is_trained() -> None:
    raw = linear_file("LinearRegressor", {"value": FLOAT}, 1, targets=1)
    model = import_onnx(raw, "model")
    x = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
    (expected,) = OnnxSession(raw).run({"image": x}).values()
    written = OnnxSession(onnx_file(model.graph, model.tensors, "model")).run({X: x})
    np.testing.assert_allclose(written["logits"], expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_transform_is_named() -> None:
    attributes = {**CLASSIFIERS["softmax of numbers"], "post_transform": "PROBIT"}
    raw = linear_file("LinearClassifier", {"label": INT64, "p": FLOAT}, **attributes)
    with pytest.raises(ModelError, match="post_transform of LinearClassifier 'linear'"):
        import_onnx(raw, "model")


def test_what_is_written_is_compared_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_models._TRANSFORMS, "NONE", "Sigmoid")
    raw = linear_file("LinearClassifier", {"label": INT64, "p": FLOAT}, **CLASSIFIERS["scores"])
    with pytest.raises(ModelError, match="'p' differs"):
        import_onnx(raw, "model")
