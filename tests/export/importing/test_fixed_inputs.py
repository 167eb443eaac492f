"""Inputs that are fixed are constants of their type and shape: the model computes what the file does for them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import load


@pytest.fixture
def recurrent(tmp_path: Path) -> Path:
    """A file of a layer whose rate and first states are inputs: of fixed sizes, of the batch and of a free one."""
    rng = np.random.default_rng(0)
    sizes = {"W": (1, 24, 3), "R": (1, 24, 6), "B": (1, 48), "V": (6, 4)}
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 3, n) for n, s in sizes.items()]
    nodes = [
        helper.make_node("Cast", ["rate"], ["scale"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "W", "R", "B", "", "h", "c"], ["y", "last", ""], hidden_size=6),
        helper.make_node("Squeeze", ["last", "zero"], ["state"]),
        helper.make_node("Gemm", ["state", "V"], ["logits"]),
    ]
    inputs: dict[str, list[str | int | None]] = {"x": ["N", 5, 3], "h": [1, "N", 6], "c": [1, "free", 6]}
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()]
        + [helper.make_tensor_value_info("rate", TensorProto.INT64, [])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [*tensors, numpy_helper.from_array(np.array([0]), "zero")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_fixed_inputs_are_constants_of_the_size_of_the_batch(recurrent: Path) -> None:
    proto = onnx.load(recurrent)
    proto.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "N"
    onnx.save(proto, recurrent)
    model = load(recurrent, fix={"rate": 2, "h": 0.5, "c": 0}, loss="cross_entropy")
    assert model.architecture.input_shape == (5, 3)
    x = np.random.default_rng(1).standard_normal((7, 5, 3)).astype(np.float32)
    states = {"h": np.full((1, 7, 6), 0.5, np.float32), "c": np.zeros((1, 7, 6), np.float32)}
    expected = OnnxSession(recurrent).run({"x": x, "rate": np.array(2), **states})["logits"]
    np.testing.assert_allclose(OnnxSession(model.graph.to_bytes()).run({"x": x})["logits"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        ({"volume": 1}, "x, h, c, rate, got 'volume'"),
        ({"rate": 0.5}, "a number of type int64, got 0.5"),
        ({"rate": "fast"}, "a number of type int64, got 'fast'"),
        ({"c": 0}, r"got \[1, free, 6\]"),
    ],
)
def test_what_cannot_be_fixed_is_refused(recurrent: Path, fix: dict[str, float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(recurrent, fix=fix)
