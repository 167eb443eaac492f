"""Spectral norms of files: the norm is folded into the weight that it divides, and only into that."""

import numpy as np
import pytest

from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.ir.graph import Graph, Port
from support.oracles.cutting import cut_error, random_selection

F32 = np.dtype(np.float32)


def normed(form: str) -> Graph:
    """A convolution with a spectral norm as torch writes it.

    `form`: "matrix", "stored" with the kernel's matrix as a tensor of its own, or "shared" with another reader.
    """
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "u": (8,), "v": (27,), "head": (8, 4)}
    graph = Graph(inputs=[Port("image", F32, ("N", 3, 6, 6))])
    graph.initializers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    graph.initializers["flat"] = graph.initializers["w"].reshape(8, 27)
    matrix = "flat" if form == "stored" else graph.emit("Reshape", "w", graph.ints(8, -1))
    norm = graph.emit("MatMul", "u", graph.emit("MatMul", matrix, "v"))
    value = graph.emit("Conv", "image", graph.emit("Div", "w", norm))
    if form == "shared":
        value = graph.emit("Add", value, graph.emit("Conv", "image", "w"))
    pooled = graph.emit("ReduceMean", graph.emit("Relu", value), attrs={"axes": [2, 3], "keepdims": 0})
    graph.outputs = [Port(graph.emit("MatMul", pooled, "head"), F32, ("N", 4))]
    graph.prune()
    return graph


@pytest.mark.parametrize(
    ("form", "parameters"), [("matrix", None), ("matrix", ["w", "head"]), ("stored", None)], ids=str
)
def test_the_norm_is_folded_and_the_layer_is_cut(form: str, parameters: list[str] | None) -> None:
    graph = normed(form)
    w, u, v = (graph.initializers[name] for name in "wuv")
    model = import_onnx(graph.to_bytes(), "net", ImportChoices(parameters=parameters))
    assert set(model.tensors) == {"w", "head"}
    assert np.abs(model.tensors["w"] - w / (u @ (w.reshape(8, 27) @ v))).max() < 1e-6
    assert [g.size for g in model.architecture.groups] == [8]
    assert cut_error(model, random_selection(model, 0.5, seed=0)) < 1e-5
    assert any("spectral norm" in note and ": w." in note for note in model.notes)


def test_a_weight_that_is_also_read_without_the_norm_stays() -> None:
    graph = normed("shared")
    model = import_onnx(graph.to_bytes(), "net", ImportChoices(parameters=["w", "head"]))
    np.testing.assert_array_equal(model.tensors["w"], graph.initializers["w"])


def test_a_weight_whose_vectors_are_trained_stays() -> None:
    names = ["head", "u", "v", "w"]
    assert sorted(import_onnx(normed("matrix").to_bytes(), "net", ImportChoices(parameters=names)).tensors) == names
