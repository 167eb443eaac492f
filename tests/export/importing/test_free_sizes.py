"""Files with free sizes besides the batch: one sample's shape fixes them, and without it the import names them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import load
from fedprune_export.ir.graph import Graph, Port
from support.oracles.cutting import distance, outputs

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
RANDOM = np.random.default_rng(0)


def pictures(path: Path, *shape: Any) -> Path:
    """A file of a convolution and a mean over the map."""
    graph = Graph(inputs=[Port("image", F32, shape)])
    for name, size in (("k", (4, 3, 3, 3)), ("v", (4, 2))):
        graph.initializers[name] = RANDOM.standard_normal(size).astype(np.float32)
    maps = graph.emit("Relu", graph.emit("Conv", "image", "k"))
    graph.outputs = [
        Port(graph.emit("Gemm", graph.emit("Flatten", graph.emit("GlobalAveragePool", maps)), "v"), F32, (None, 2))
    ]
    path.write_bytes(graph.to_bytes())
    return path


def texts(path: Path) -> Path:
    """A file of token ids and a mask, which share the name of their length."""
    graph = Graph(inputs=[Port("ids", I64, ("batch", "length")), Port("mask", I64, ("batch", "length"))])
    for name, size in (("e", (9, 4)), ("v", (4, 2))):
        graph.initializers[name] = RANDOM.standard_normal(size).astype(np.float32)
    real = graph.emit("Unsqueeze", graph.emit("Cast", "mask", attrs={"to": 1}), graph.ints(2))
    vectors = graph.emit("Mul", graph.emit("Gather", "e", "ids"), real)
    means = graph.emit("ReduceMean", vectors, attrs={"axes": [1], "keepdims": 0})
    graph.outputs = [Port(graph.emit("Gemm", means, "v"), F32, ("batch", 2))]
    path.write_bytes(graph.to_bytes())
    return path


@pytest.mark.parametrize("shape", [("N", 3, "H", "W"), (None, 3, None, None), (1, 3, "H", "W"), ("N", "C", 8, "W")])
def test_a_shape_fixes_free_sizes(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    path = pictures(tmp_path / "net.onnx", *shape)
    model = load(path, input_shape=(3, 8, 6))
    assert model.architecture.input_shape == (3, 8, 6)
    x = RANDOM.standard_normal((1, 3, 8, 6)).astype(np.float32)
    assert distance(outputs(model.graph, x), next(iter(OnnxSession(path).run({"image": x}).values()))) < 1e-5


@pytest.mark.parametrize("free", [0, -1])
def test_sizes_of_0_and_minus_1_are_free(tmp_path: Path, free: int) -> None:
    proto = onnx.load(pictures(tmp_path / "net.onnx", "N", 3, 8, 6))
    for axis in (0, 2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = free
    onnx.save(proto, tmp_path / "net.onnx")
    assert load(tmp_path / "net.onnx", input_shape=(3, 8, 6)).architecture.input_shape == (3, 8, 6)


def test_transforms_of_frames_of_sounds_of_free_length_are_those_of_onnxruntime(tmp_path: Path) -> None:
    """At free sizes onnxruntime takes a frame length with an axis, and isn't misled by what onnx infers where half of
    the frequencies are left out by default."""
    graph = Graph(inputs=[Port("sound", F32, ("n", "length", 1))])
    graph.initializers["v"] = RANDOM.standard_normal((4 * 5 * 2, 3)).astype(np.float32)
    step, length = graph.constant(8, np.int64), graph.constant([8], np.int64)
    frames = graph.emit("Flatten", graph.emit("STFT", "sound", step, "", length))
    graph.outputs = [Port(graph.emit("MatMul", frames, "v"), F32, ("n", 3))]
    path = tmp_path / "net.onnx"
    path.write_bytes(graph.to_bytes())
    x = RANDOM.standard_normal((5, 32, 1)).astype(np.float32)
    model = load(path, input_shape=(32, 1))
    assert distance(outputs(model.graph, x), next(iter(OnnxSession(path).run({"sound": x}).values()))) < 1e-5


def test_inputs_that_share_a_size_get_it_together(tmp_path: Path) -> None:
    assert load(texts(tmp_path / "net.onnx"), input_shape=(5,)).architecture.input_shape == (10,)


@pytest.mark.parametrize(
    ("shape", "given", "text"),
    [
        (("N", 3, "height", "W"), None, r"axis 2 \('height'\), axis 3 \('W'\).*--input-shape 3,height,W"),
        ((None, 3, 8, None), None, r"axis 3.*--input-shape 3,8,SIZE3"),
        (("N", 3, "H", "W"), (4, 8, 8), r"shape of one sample.*\[n, 4, 8, 8\].*\[N, 3, H, W\]"),
        (("N", 3, "H", "W"), (8, 8), r"shape of one sample"),
        (("N", 3, 8, 8), (3, 9, 9), r"shape of one sample"),
    ],
)
def test_free_sizes_without_a_shape_that_fits_are_named(
    tmp_path: Path, shape: tuple[Any, ...], given: tuple[int, ...] | None, text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        load(pictures(tmp_path / "net.onnx", *shape), input_shape=given)


def test_a_shape_of_inputs_with_several_free_sizes_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'ids'.*axis 1 \('length'\).*--input-shape length"):
        load(texts(tmp_path / "net.onnx"))
