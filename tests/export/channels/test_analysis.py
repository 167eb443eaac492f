"""Architectures that the channel analysis finds; `pruning/test_torch_pruning.py` has more networks."""

from collections.abc import Callable

import numpy as np
import pytest

from fedprune.model.architecture import TensorKind
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.nets import published_nets as zoo

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]
F32 = np.dtype(np.float32)


@pytest.mark.parametrize("name", zoo.MARKED)
def test_layers_count_the_weights_of_the_module(imported: Imported, name: str) -> None:
    model, module = imported(name), zoo.make(name)
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert set(model.tensors) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(model.tensors[key], value.numpy())


def test_kinds_follow_use(imported: Imported) -> None:
    kinds = {t.name: t.kind for t in imported("resnet20_bn").architecture.tensors}
    assert kinds["conv1.weight"] is TensorKind.WEIGHT
    assert kinds["bn1.weight"] is TensorKind.NORM_SCALE
    assert kinds["bn1.bias"] is TensorKind.NORM_BIAS
    assert kinds["bn1.running_mean"] is TensorKind.STAT_MEAN
    assert kinds["bn1.running_var"] is TensorKind.STAT_VAR
    assert kinds["fc.bias"] is TensorKind.BIAS


def test_flattened_channels_have_an_inner_length(imported: Imported) -> None:
    (segment,) = imported("lenet").architecture.by_name["fc1.weight"].axes[1].segments
    assert (segment.count, segment.inner) == (16, 16)


def test_concatenated_channels_are_segments_of_their_groups(imported: Imported) -> None:
    architecture = imported("concat_net").architecture
    for name, inner in (("last.weight", 1), ("fc.weight", 16)):
        axis = architecture.by_name[name].axes[-1]
        assert [(s.count, s.inner) for s in axis.segments] == [(8, inner), (6, inner), (6, inner), (6, inner)]
        assert len(axis.groups) == 4


def test_activations_lists_what_a_backward_pass_keeps(imported: Imported) -> None:
    activations = {
        a.name: (a.channels.length, a.positions) for a in imported("lenet").architecture.activations if a.is_kept
    }
    assert activations["x"] == (1, 28 * 28)
    assert (6, 24 * 24) in activations.values()
    assert (16, 16) in activations.values()
    assert activations.keys().isdisjoint({"logits"})


def test_an_operator_without_a_rule_fixes_its_channels_and_is_named() -> None:
    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("x", F32, ("N", 3, 8, 8))])
    graph.initializers["a"] = rng.standard_normal((6, 3, 1, 1)).astype(np.float32)
    graph.initializers["b"] = rng.standard_normal((4, 6, 1, 1)).astype(np.float32)
    graph.initializers["c"] = rng.standard_normal((5, 4, 8, 7)).astype(np.float32)
    value = graph.emit("Conv", "x", "a")
    value = graph.emit("Compress", value, graph.constant([True] * 7 + [False], np.bool_), attrs={"axis": 3})
    value = graph.emit("Conv", value, "b")
    value = graph.emit("Flatten", graph.emit("Conv", value, "c"))
    graph.outputs = [Port(value, F32, ("N", 5))]
    model = import_onnx(graph.to_bytes(), "net")
    assert [(g.size, model.architecture.members(i)) for i, g in enumerate(model.architecture.groups)] == [
        (4, ("b[0]", "c[1]"))
    ]
    assert any("Compress" in note and "no channel rule" in note for note in model.notes)


def test_widths_that_no_shape_tells_stay() -> None:
    """Two groups side by side wherever they occur: one of them stays, and the note says so."""
    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("x", F32, ("N", 3))])
    for name, shape in (("a", (3, 7)), ("b", (7, 2))):
        graph.initializers[name] = rng.standard_normal(shape).astype(np.float32)
    value = graph.emit("MatMul", "x", "a")
    pieces = [
        graph.emit("Slice", value, graph.ints(start), graph.ints(stop), graph.ints(1))
        for start, stop in ((3, 7), (0, 3))
    ]
    value = graph.emit("Concat", pieces[0], graph.emit("Tanh", pieces[1]), attrs={"axis": 1})
    graph.outputs = [Port(graph.emit("MatMul", value, "b"), F32, ("N", 2))]
    model = import_onnx(graph.to_bytes(), "net")
    assert [g.size for g in model.architecture.groups] == [4]
    assert any("3 channels stay" in note for note in model.notes)
