"""Models that are made to do harm: each is one error of ours that says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fedprune.errors import ModelError
from fedprune_export.importing import PARAMETERS_KEY, import_onnx, load

Nodes = list[onnx.NodeProto]
Tensors = dict[str, np.ndarray[Any, Any]]
Shape = tuple[int | str, ...]

W = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def model(
    tensors: Tensors, nodes: Nodes | None = None, shape: Shape = ("N", 6), classes: int = 4, listed: str | None = None
) -> bytes:
    """A model; by default one matrix product with the first of its tensors."""
    made = nodes or [helper.make_node("Gemm", ["x", next(iter(tensors))], ["y"])]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if listed is not None:
        proto.metadata_props.add(key=PARAMETERS_KEY, value=listed)
    raw: bytes = proto.SerializeToString()
    return raw


def test_the_model_that_the_attacks_start_from_is_sound() -> None:
    assert set(import_onnx(model({"w": W}, listed='["w"]'), "net").tensors) == {"w"}


@pytest.mark.parametrize("name", ["a~²", "a~" + "9" * 5000, "a~", "~"])
def test_odd_names_are_names(name: str) -> None:
    assert set(import_onnx(model({name: W}), "net").tensors) == {name}


def _flat() -> Nodes:
    return [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]


def _with(value: float) -> np.ndarray[Any, Any]:
    out = W.copy()
    out[3, 2] = value
    return out


def _shifted(constant: float) -> Nodes:
    filled = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.full(6, constant, np.float32)))
    return [filled, helper.make_node("Max", ["x", "c"], ["s"]), helper.make_node("Gemm", ["s", "w"], ["y"])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model({"w": _with(np.nan)}), "tensor w: expected finite numbers, got NaN"),
        (lambda: model({"w": _with(np.inf)}), "tensor w: expected finite numbers, got an infinite"),
        (lambda: model({"w": W}, _shifted(np.nan)), "expected finite numbers, got NaN"),
        (lambda: model({"w": W}, _shifted(np.inf)), "output is not finite"),
        (lambda: model({"w": W}, shape=("N", -6)), "size of input x"),
        (lambda: model({"w": W}, shape=("N", 0)), "size of input x"),
        (lambda: model({"w": W}, _flat(), shape=("N", 10**6, 10**6)), "size of input x"),
        (lambda: model({"w": W}, _flat(), shape=("N", *[2**40] * 6)), "size of input x"),
        (lambda: model({"w": W[:, :0]}, classes=0), "the model's output"),
        (lambda: model({}, [helper.make_node("Relu", ["x"], ["y"])], classes=6), "no trainable tensor"),
        (lambda: model({"w": W}, listed="[]"), "no trainable tensor"),
        (lambda: model({"w": W}, listed='["zz"]'), "names a tensor that isn't there: got 'zz'"),
        (lambda: model({"w": W}, listed='"w"'), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed='{"w": 1}'), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed="[[]]"), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed="[1]"), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed="[" * 100_000), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed="9" * 5000), "expected a list of tensor names"),
        (lambda: model({"w": W}, listed=json.dumps(["w", "x" * 10**6])), "names a tensor that isn't there"),
    ],
)
def test_an_attack_is_one_error(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        import_onnx(make(), "net")

    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def _external(folder: Path, location: str) -> Path:
    proto = onnx.load_model_from_string(model({"w": W}))
    (tensor,) = proto.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(W.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "models" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    path = _external(tmp_path, "w.bin")
    (path.parent / "w.bin").write_bytes(W.tobytes())

    np.testing.assert_array_equal(load(path).tensors["w"], W)


@pytest.mark.parametrize("place", ["above", "absolute", "symlink"])
def test_external_data_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(W.tobytes())
    path = _external(tmp_path, {"above": "../secret.bin", "absolute": str(secret), "symlink": "link.bin"}[place])
    if place == "symlink":
        (path.parent / "link.bin").symlink_to(secret)

    with pytest.raises(ModelError, match=r"m\.onnx: its external data can't be read"):
        load(path)
