"""Cut graphs: their batch, weights and nodes, and what becomes of sizes that a graph computes with.

`test_whole_models.py` and `test_hard_nets.py` compare cuts with the masked whole.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import BundleError
from fedprune.model.selection import Selection
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from support.nets import published_nets as zoo
from support.nets import small_nets
from support.oracles.cutting import cut_error, inputs, outputs, random_selection

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]


def test_rules_are_there_for_a_model_that_another_process_has_imported(tmp_path: Path) -> None:
    model = import_onnx(export_torch(small_nets.gru_net()), "gru")
    selection = random_selection(model, 0.5, seed=1)
    (tmp_path / "model").write_bytes(pickle.dumps((model, selection)))
    code = (
        "import pickle, sys; from pathlib import Path; from fedprune_export.pruning.cut import cut\n"
        "graph = cut(*pickle.loads(Path(sys.argv[1]).read_bytes())); Path(sys.argv[2]).write_bytes(graph.to_bytes())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "cut")], check=True)
    assert (tmp_path / "cut").read_bytes() == cut(model, selection).to_bytes()


def test_samples_of_a_batch_do_not_mix(imported: Imported) -> None:
    model = imported("lenet")
    graph, x = cut(model, random_selection(model, 0.5, seed=2)), inputs(model, 6)
    np.testing.assert_allclose(outputs(graph, x)[4:5], outputs(graph, x[4:5]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", zoo.MARKED)
@pytest.mark.at_push(2)
def test_reordering_channels_changes_nothing(imported: Imported, name: str) -> None:
    model = imported(name)
    x = inputs(model, 2)
    shuffled = outputs(cut(model, random_selection(model, 1.0, seed=3)), x)
    np.testing.assert_allclose(shuffled, outputs(model.graph, x), rtol=1e-3, atol=1e-5)


def test_a_foreign_selection_is_refused(imported: Imported) -> None:
    with pytest.raises(BundleError, match="another architecture"):
        cut(imported("lenet"), Selection.full(imported("concat_net").architecture))


def _net(build: Callable[[Graph, np.random.Generator], str], classes: int, channels: int = 3) -> Model:
    """A model out of nodes that `build` emits; a global pooling and a linear layer follow."""
    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("image", np.dtype(np.float32), ("batch", channels, 8, 8))])
    pooled = graph.emit("Flatten", graph.emit("GlobalAveragePool", build(graph, rng)), attrs={"axis": 1})
    graph.initializers["head"] = rng.standard_normal((graph.initializers["last"].shape[0], classes)).astype(np.float32)
    graph.emit("MatMul", pooled, "head", out="scores")
    graph.outputs = [Port("scores", np.dtype(np.float32), ("batch", classes))]
    return import_onnx(graph.to_bytes(), "net")


def _conv(
    graph: Graph, rng: np.random.Generator, value: str, name: str, shape: tuple[int, ...], **attrs: object
) -> str:
    graph.initializers[name] = rng.standard_normal(shape).astype(np.float32) / 4
    attrs.setdefault("pads", [shape[-1] // 2] * 4)
    return graph.emit("Conv", value, name, attrs=attrs)


def test_a_reshape_target_follows_the_cut_and_leaves_the_batch_free() -> None:
    def build(graph: Graph, rng: np.random.Generator) -> str:
        value = graph.emit("Relu", _conv(graph, rng, "image", "first", (6, 3, 3, 3)))
        batch = graph.emit("Slice", graph.emit("Shape", value), graph.ints(0), graph.ints(1))
        rows = graph.emit("Reshape", value, graph.emit("Concat", batch, graph.ints(6, 64), attrs={"axis": 0}))
        target = graph.emit("Concat", batch, graph.ints(6, 8, 8), attrs={"axis": 0})
        return _conv(graph, rng, graph.emit("Reshape", rows, target), "last", (8, 6, 1, 1))

    model = _net(build, 4)
    assert [g.size for g in model.architecture.groups] == [6, 8]
    assert cut_error(model, random_selection(model, 0.5, seed=1), batch=11) < 1e-5


def _number_of_channels(graph: Graph, value: str, how: str) -> str:
    """A float that a graph computes from the shape of a value."""
    if how == "size":
        measured = graph.emit("Size", value)
    else:
        measured = graph.emit("ReduceMax", graph.emit("Shape", value), attrs={"keepdims": 0})
    if how == "product":  # of sizes of two values, one after the other
        other = graph.emit("ReduceMax", graph.emit("Shape", "image"), attrs={"keepdims": 0})
        measured = graph.emit("Mul", other, measured)
    return graph.emit("Cast", measured, attrs={"to": 1})


@pytest.mark.parametrize("how", ["largest", "size", "product"])
def test_channels_stay_where_the_graph_computes_with_their_number(how: str) -> None:
    def build(graph: Graph, rng: np.random.Generator) -> str:
        value = graph.emit("Relu", _conv(graph, rng, "image", "first", (16, 3, 3, 3)))
        value = graph.emit("Div", value, _number_of_channels(graph, value, how))
        return _conv(graph, rng, value, "last", (8, 16, 1, 1))

    model = _net(build, 4)
    assert [g.size for g in model.architecture.groups] == [8]
    assert any("uses a number of channels as a value" in note for note in model.notes)
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5


def test_channels_go_where_the_graph_computes_with_the_batch_alone() -> None:
    def build(graph: Graph, rng: np.random.Generator) -> str:
        value = graph.emit("Relu", _conv(graph, rng, "image", "first", (16, 3, 3, 3)))
        batch = graph.emit("Slice", graph.emit("Shape", value), graph.ints(0), graph.ints(1))
        value = graph.emit("Div", value, graph.emit("Cast", batch, attrs={"to": 1}))
        return _conv(graph, rng, value, "last", (8, 16, 1, 1))

    model = _net(build, 4)
    assert [g.size for g in model.architecture.groups] == [16, 8]
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5


@pytest.mark.parametrize("axes", [[1], []], ids=["axis", "no axes"])
def test_channels_that_are_sliced_off_stay(axes: list[int]) -> None:
    def build(graph: Graph, rng: np.random.Generator) -> str:
        value = graph.emit("Relu", _conv(graph, rng, "image", "first", (6, 3, 3, 3)))
        ranges = (graph.ints(1), graph.ints(5), graph.ints(1)) if axes else (graph.ints(0, 1), graph.ints(2**31, 5))
        return _conv(graph, rng, graph.emit("Slice", value, *ranges), "last", (8, 4, 1, 1))

    model = _net(build, 4)
    assert [g.size for g in model.architecture.groups] == [4, 8]
    assert model.architecture.shape("first", [1, 1]) == (3, 3, 3, 3)
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5


def test_channels_that_a_reshape_mixes_stay_and_are_named() -> None:
    def build(graph: Graph, rng: np.random.Generator) -> str:
        value = graph.emit("Relu", _conv(graph, rng, "image", "first", (6, 3, 3, 3)))
        value = graph.emit("Tanh", graph.emit("Reshape", value, graph.ints(-1, 32, 12)))
        return _conv(graph, rng, graph.emit("Reshape", value, graph.ints(-1, 6, 8, 8)), "last", (8, 6, 1, 1))

    model = _net(build, 4)
    assert [g.size for g in model.architecture.groups] == [8]
    assert any("mixes channels" in note for note in model.notes)
    assert cut_error(model, random_selection(model, 0.5, seed=1)) < 1e-5
