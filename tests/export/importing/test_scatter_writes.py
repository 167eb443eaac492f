"""Writes at constant indices: what can be cut of the written channels and of those that are left."""

from typing import Any

import numpy as np
import pytest

from fedprune.model.features import Features
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import cut_error, random_selection

F32 = np.dtype(np.float32)


def net(op: str, written: list[int], *, channels: int = 8, **attrs: Any) -> Model:
    """Channels of a map [n, 4, channels], some written with as many of another; the raw file's run is the oracle."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, channels), "b": (5, len(written)), "c": (channels, 6), "d": (6, 3)}
    graph = Graph(inputs=[Port("image", F32, ("N", 4, 5))])
    graph.initializers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base, new = (graph.emit("Tanh", graph.emit("MatMul", "image", name)) for name in "ab")
    batch = graph.emit("Shape", "image", attrs={"end": 1})
    if op == "ScatterElements":
        size = graph.emit("Concat", batch, graph.ints(4, len(written)), attrs={"axis": 0})
        indices = graph.emit("Expand", graph.constant([[written]], np.int64), size)
        value = graph.emit(op, base, indices, new, attrs={"axis": 2, **attrs})
    else:
        # Channels first, as torch writes them.
        base, new = (graph.emit("Transpose", v, attrs={"perm": [2, 0, 1]}) for v in (base, new))
        value = graph.emit(op, base, graph.constant([[i] for i in written], np.int64), new, attrs=attrs)
        value = graph.emit("Transpose", value, attrs={"perm": [1, 2, 0]})
    value = graph.emit("MatMul", graph.emit("Relu", graph.emit("MatMul", value, "c")), "d")
    graph.outputs = [Port(graph.emit("ReduceMean", value, attrs={"axes": [1], "keepdims": 0}), F32, ("N", 3))]
    model = import_onnx(graph.to_bytes(), "net")
    for density in (0.25, 0.5, 0.75):
        assert cut_error(model, random_selection(model, density, seed=1)) < 1e-5
    training_graph(model, Features())
    return model


@pytest.mark.parametrize(
    ("op", "written", "attrs", "groups"),
    [
        ("ScatterND", [0, 1, 2, 3], {}, [4, 4, 4, 6]),  # two groups of the base: what is overwritten, what is left
        ("ScatterND", [5, 4, 6, -1], {"reduction": "add"}, [4, 2, 6]),  # two of them in another order stay
        ("ScatterElements", [4, 5, 6, 7], {"reduction": "mul"}, [4, 4, 6]),
        ("ScatterElements", [-8, 1, 2], {}, [3, 5, 3, 6]),
        ("ScatterND", list(range(8)), {}, [8, 6]),
    ],
)
def test_written_channels_are_cut_with_what_they_are_written_to(
    op: str, written: list[int], attrs: dict[str, str], groups: list[int]
) -> None:
    model = net(op, written, **attrs)
    assert sorted(g.size for g in model.architecture.groups) == sorted(groups), model.notes
    assert not any(n.op.startswith("Scatter") for n in model.graph.nodes)


@pytest.mark.parametrize("op", ["ScatterND", "ScatterElements"])
@pytest.mark.parametrize(
    ("written", "channels"), [([1, 1, 4], 8), (list(range(0, 24, 2)), 24)], ids=["one twice", "every second"]
)
def test_other_writes_train_with_all_their_channels(op: str, written: list[int], channels: int) -> None:
    model = net(op, written, channels=channels, reduction="add")
    assert [g.size for g in model.architecture.groups] == [6], model.notes
    assert any(n.op == op for n in model.graph.nodes)


def test_indices_of_a_weight_stay_computed_because_training_changes_them() -> None:
    graph, rng = Graph(inputs=[Port("image", F32, ("N", 5))]), np.random.default_rng(0)
    shapes = {"a": (5, 8), "b": (5, 2), "c": (8, 3)}
    graph.initializers = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base, new = (graph.emit("MatMul", "image", name) for name in "ab")
    indices = graph.emit("Expand", graph.emit("ArgMax", "b", attrs={"axis": 0}), graph.emit("Shape", new))
    value = graph.emit("MatMul", graph.emit("ScatterElements", base, indices, new, attrs={"axis": 1}), "c")
    graph.outputs = [Port(value, F32, ("N", 3))]
    assert any(n.op == "ScatterElements" for n in import_onnx(graph.to_bytes(), "net").graph.nodes)
