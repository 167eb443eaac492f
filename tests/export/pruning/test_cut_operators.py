"""Every operator with a channel rule between two convolutions: what stays, what goes, and that cuts are right."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.oracles.cutting import cut_error, random_selection

F32 = np.dtype(np.float32)
CHANNELS, SIDE = 8, 6

Build = Callable[[Graph, str], str]


@dataclass(frozen=True)
class Net:
    """A network with one operator in the middle.

    Attributes:
        build: Emits what comes behind a convolution that makes 8 channels.
        groups: Sizes of the channel groups that must be found.
        width: Channels that come out.
        features: Whether they come as rows of places; else a convolution that makes 6 channels of them follows.
        opset: The operator set.
    """

    build: Build
    groups: list[int]
    width: int = 8
    features: bool = False
    opset: int = 17


NETS: dict[str, Net] = {}


def net(*groups: int, width: int = 8, features: bool = False, opset: int = 17) -> Callable[[Build], Build]:
    """Register a network by the name of its function."""

    def register(build: Build) -> Build:
        NETS[build.__name__] = Net(build, list(groups), width, features, opset)
        return build

    return register


def weight(graph: Graph, name: str, *shape: int) -> str:
    rng = np.random.default_rng(sum(map(ord, name)))
    graph.initializers[name] = (rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)
    return name


def conv(graph: Graph, value: str, name: str, before: int, after: int) -> str:
    return graph.emit("Conv", value, weight(graph, name, after, before, 3, 3), attrs={"pads": [1] * 4})


def ints(graph: Graph, values: list[int] | list[list[int]]) -> str:
    return graph.constant(values, np.int64)


def batch(graph: Graph, value: str) -> str:
    return graph.emit("Slice", graph.emit("Shape", value), graph.ints(0), graph.ints(1))


def model(name: str) -> Model:
    recipe = NETS[name]
    graph = Graph(inputs=[Port("image", F32, ("batch", 3, SIDE, SIDE))], opset=recipe.opset)
    value = graph.emit("Relu", conv(graph, "image", "first", 3, CHANNELS))
    value = recipe.build(graph, value)
    if not recipe.features:
        value = conv(graph, value, "last", recipe.width, 6)
        value = graph.emit("Reshape", value, graph.ints(0, 6, -1))
    # From opset 18 on the axes are an input.
    axes = {} if recipe.opset >= 18 else {"axes": [2]}
    inputs = [value, graph.ints(2)] if recipe.opset >= 18 else [value]
    pooled = graph.emit("ReduceMean", *inputs, attrs={**axes, "keepdims": 0})
    out = graph.emit("MatMul", pooled, weight(graph, "head", recipe.width if recipe.features else 6, 4))
    graph.outputs = [Port(out, F32, ("batch", 4))]
    return import_onnx(graph.to_bytes(), name)


NETS |= {
    "depth_to_space": Net(
        lambda g, v: g.emit("DepthToSpace", conv(g, v, "wide", 8, 32), attrs={"blocksize": 2, "mode": "CRD"}), [8, 8, 6]
    ),
    "depth_to_space_by_depth": Net(
        lambda g, v: g.emit("DepthToSpace", conv(g, v, "wide", 8, 32), attrs={"blocksize": 2}), [8, 8, 6]
    ),
    "space_to_depth": Net(lambda g, v: g.emit("SpaceToDepth", v, attrs={"blocksize": 2}), [8, 6], width=32),
    "largest_channels": Net(
        lambda g, v: g.emit_many("TopK", v, g.ints(3), outputs=2, attrs={"axis": 1})[0], [6], width=3
    ),
    "tiled": Net(lambda g, v: g.emit("Tile", v, g.ints(1, 2, 1, 1)), [8, 6], width=16),
    "expanded_to_a_shape": Net(
        lambda g, v: g.emit("Add", v, g.emit("Expand", weight(g, "level", 1, 1, 1), g.emit("Shape", v))), [8, 6]
    ),
    "resized_by_scales": Net(
        lambda g, v: g.emit("Resize", v, "", g.constant([1, 1, 2, 2], np.float32), attrs={"mode": "nearest"}), [8, 6]
    ),
    "channels_reflected": Net(
        lambda g, v: g.emit("Pad", v, g.ints(0, 1, 0, 0, 0, 1, 0, 0), attrs={"mode": "reflect"}), [6], width=10
    ),
    "channels_cropped": Net(lambda g, v: g.emit("Pad", v, g.ints(0, -1, 0, 0, 0, -1, 0, 0)), [6], width=6),
    "channels_backwards": Net(
        lambda g, v: g.emit("Slice", v, g.ints(-1), g.ints(-(2**62)), g.ints(1), g.ints(-1)), [6]
    ),
    "every_second_channel": Net(
        lambda g, v: g.emit("Slice", v, g.ints(1), g.ints(8), g.ints(1), g.ints(2)), [4, 6], width=4
    ),
    "channels_by_an_unsorted_index": Net(
        lambda g, v: g.emit("Gather", v, g.ints(7, 3, 5, 1, 6, 2, 4, 0), attrs={"axis": 1}), [6]
    ),
    "einsum_as_a_layer": Net(
        lambda g, v: g.emit("Einsum", v, weight(g, "matrix", 7, 8), attrs={"equation": "nc...,oc->no..."}),
        [8, 7, 6],
        width=7,
    ),
    "mean_over_channels": Net(
        lambda g, v: g.emit("Sub", v, g.emit("ReduceMean", v, attrs={"axes": [1], "keepdims": 1})), [8, 6]
    ),
    "unit_length": Net(lambda g, v: g.emit("LpNormalization", v, attrs={"axis": 1}), [6]),
    "softmax_of_places": Net(lambda g, v: g.emit("Softmax", v, attrs={"axis": 3}), [8, 6]),
    "triangles": Net(lambda g, v: g.emit("Trilu", v), [8, 6]),
    "lstm_with_peepholes": Net(lambda g, v: recurrent(g, v, "LSTM", 4, peepholes=True), [8, 5], width=5, features=True),
    "gru_with_reset_first": Net(
        lambda g, v: recurrent(g, v, "GRU", 3, direction="bidirectional", linear_before_reset=1),
        [8, 5],
        width=10,
        features=True,
    ),
    "rnn_backwards": Net(lambda g, v: recurrent(g, v, "RNN", 1, direction="reverse"), [8, 5], width=5, features=True),
    "one_value_twice": Net(lambda g, v: g.emit("Concat", v, g.emit("Neg", v), attrs={"axis": 1}), [8, 6], width=16),
}


@net(8, 6)
def place_of_the_largest(graph: Graph, value: str) -> str:
    where = graph.emit("ArgMax", value, attrs={"axis": 3, "keepdims": 1})
    return graph.emit("Mul", value, graph.emit("Cast", where, attrs={"to": 1}))


@net(8, 6)
def expanded_channels(graph: Graph, value: str) -> str:
    one = graph.emit("Conv", value, weight(graph, "one", 1, 8, 1, 1))
    target = graph.emit("Concat", batch(graph, value), graph.ints(8, 6, 6), attrs={"axis": 0})
    return graph.emit("Mul", value, graph.emit("Expand", one, target))


@net(8, 6)
def filled_to_a_shape(graph: Graph, value: str) -> str:
    filled = graph.emit("ConstantOfShape", graph.emit("Shape", value), attrs={"value": np.full(1, 0.3, np.float32)})
    return graph.emit("Add", value, filled)


@net(8, 6)
def sums_of_a_filled_shape(graph: Graph, value: str) -> str:
    """Ones in the shape of a value that loses channels; sums along them stay."""
    ones = graph.emit("ConstantOfShape", graph.emit("Shape", value), attrs={"value": np.ones(1, np.float32)})
    return graph.emit("Add", value, conv(graph, graph.emit("CumSum", ones, graph.constant(1, np.int64)), "other", 8, 8))


@net(6)
def indices_of_a_pool(graph: Graph, value: str) -> str:
    pooled, where = graph.emit_many("MaxPool", value, outputs=2, attrs={"kernel_shape": [2, 2]})
    return graph.emit("Add", pooled, graph.emit("Mul", graph.emit("Cast", where, attrs={"to": 1}), graph.scalar(1e-3)))


@net(3, 6)
def split_unevenly(graph: Graph, value: str) -> str:
    a, b, c = graph.emit_many("Split", value, graph.ints(3, 2, 3), outputs=3, attrs={"axis": 1})
    return graph.emit("Concat", graph.emit("Tanh", c), a, b, attrs={"axis": 1})


@net(8, 6)
def sliced_at_other_places(graph: Graph, value: str) -> str:
    blocks = graph.emit("Conv", value, weight(graph, "blocks", 8, 4, 1, 1), attrs={"group": 2})
    return conv(graph, graph.emit("Slice", blocks, graph.ints(1), graph.ints(7), graph.ints(1)), "other", 6, 8)


@net(4, 6)
def one_channel_as_a_gate(graph: Graph, value: str) -> str:
    gate = graph.emit("Gather", value, graph.constant(3, np.int64), attrs={"axis": 1})
    return graph.emit("Mul", value, graph.emit("Unsqueeze", gate, graph.ints(1)))


@net(3, 3, 6, width=5)
def gathered_channels(graph: Graph, value: str) -> str:
    some = graph.emit("Gather", value, graph.ints(0, 1, -3, -2, -1), attrs={"axis": 1})
    return graph.emit("Add", some, conv(graph, value, "other", 8, 5))


@net(8, features=True)
def looked_up_places(graph: Graph, value: str) -> str:
    last = graph.emit("Transpose", value, attrs={"perm": [2, 3, 0, 1]})
    some = graph.emit("GatherND", last, ints(graph, [[0, 1], [2, 3]]))
    changed = graph.emit("ScatterND", last, ints(graph, [[4, 4], [5, 0]]), graph.emit("Tanh", some))
    return graph.emit(
        "Reshape", graph.emit("Transpose", changed, attrs={"perm": [2, 3, 0, 1]}), ints(graph, [-1, 8, 36])
    )


@net(8, 8, features=True)
def boxes_that_are_kept(graph: Graph, value: str) -> str:
    """Of the boxes that each place gives those that overlap with none of a better one; 0 for the others."""
    rows = graph.emit("Transpose", graph.emit("Reshape", value, ints(graph, [0, 8, 36])), attrs={"perm": [0, 2, 1]})
    boxes = graph.emit("MatMul", rows, weight(graph, "to_boxes", 8, 4))
    scores = graph.emit(
        "Transpose", graph.emit("MatMul", rows, weight(graph, "to_score", 8, 1)), attrs={"perm": [0, 2, 1]}
    )
    picks = graph.emit("NonMaxSuppression", boxes, scores, graph.ints(9), graph.constant([0.5], np.float32))
    place = graph.emit("Gather", picks, graph.ints(0, 2), attrs={"axis": 1})
    none = graph.emit("Mul", boxes, graph.scalar(0))
    chosen = graph.emit("ScatterND", none, place, graph.emit("GatherND", boxes, place))
    back = graph.emit("MatMul", chosen, weight(graph, "from_boxes", 4, 8))
    return graph.emit("Transpose", back, attrs={"perm": [0, 2, 1]})


@net(8, 7, 6, width=7)
def einsum_without_an_output(graph: Graph, value: str) -> str:
    mixed = graph.emit("Einsum", value, weight(graph, "matrix", 8, 7), attrs={"equation": "nbhw,bz"})
    return graph.emit("Transpose", mixed, attrs={"perm": [1, 3, 0, 2]})


@net(8, 6)
def energy_of_channels(graph: Graph, value: str) -> str:
    for op in ("ReduceSumSquare", "ReduceL2", "ReduceL1"):
        total = graph.emit(op, value, attrs={"axes": [1], "keepdims": 1})
        value = graph.emit("Div", value, graph.emit("Add", total, graph.scalar(1)))
    return value


@net(8, 6)
def comparisons(graph: Graph, value: str) -> str:
    second = graph.emit("Tanh", conv(graph, value, "other", 8, 8))
    either = graph.emit(
        "Or", graph.emit("Less", value, second), graph.emit("Not", graph.emit("Greater", value, second))
    )
    both = graph.emit("And", either, graph.emit("GreaterOrEqual", value, graph.scalar(0.1)))
    return graph.emit("Where", both, graph.emit("Mod", value, graph.scalar(0.7), attrs={"fmod": 1}), second)


def steps(graph: Graph, value: str) -> str:
    """The places as steps of a sequence: (places, batch, channels)."""
    return graph.emit("Transpose", graph.emit("Reshape", value, graph.ints(-1, 8, 36)), attrs={"perm": [2, 0, 1]})


def recurrent(graph: Graph, value: str, op: str, gates: int, **attrs: object) -> str:
    """A recurrent layer of 5 units over the places, its output as (batch, units of all directions, places)."""
    directions = 2 if attrs.get("direction") == "bidirectional" else 1
    tensors = [
        weight(graph, "w", directions, gates * 5, 8),
        weight(graph, "r", directions, gates * 5, 5),
        weight(graph, "b", directions, gates * 10),
    ]
    if attrs.pop("peepholes", False):
        tensors += ["", "", "", weight(graph, "p", directions, 15)]
    y = graph.emit(op, steps(graph, value), *tensors, attrs={"hidden_size": 5, **attrs})
    return graph.emit(
        "Reshape", graph.emit("Transpose", y, attrs={"perm": [2, 1, 3, 0]}), graph.ints(-1, directions * 5, 36)
    )


@net(6)
def channels_in_the_batch(graph: Graph, value: str) -> str:
    rows = graph.emit("Relu", graph.emit("Reshape", value, graph.ints(-1, 1, 6, 6)))
    rows = graph.emit("Conv", rows, weight(graph, "shared", 1, 1, 3, 3), attrs={"pads": [1] * 4})
    return graph.emit("Reshape", rows, graph.ints(-1, 8, 6, 6))


@net(4, 4, width=4, features=True)
def flattened_and_sliced(graph: Graph, value: str) -> str:
    flat = graph.emit("Slice", graph.emit("Flatten", value), graph.ints(0), graph.ints(144), graph.ints(1))
    return graph.emit("Reshape", graph.emit("Tanh", flat), graph.ints(-1, 4, 36))


@net(4, 3, 6, 6, width=6)
def a_channel_sliced_through(graph: Graph, value: str) -> str:
    flat = graph.emit("Slice", graph.emit("Flatten", value), graph.ints(0), graph.ints(150), graph.ints(1))
    return graph.emit("Unsqueeze", graph.emit("MatMul", flat, weight(graph, "mix", 150, 6)), graph.ints(2, 3))


@net(4, 6, opset=21)
def group_norm(graph: Graph, value: str) -> str:
    vectors = (weight(graph, "scale", 8), weight(graph, "shift", 8))
    return graph.emit("GroupNormalization", value, *vectors, attrs={"num_groups": 4})


@net(8, 6, opset=23)
def rms_norm(graph: Graph, value: str) -> str:
    return graph.emit("RMSNormalization", value, weight(graph, "scale", 8, 1, 1), attrs={"axis": 1})


@net(8, 6)
def layer_norm(graph: Graph, value: str) -> str:
    ones = graph.constant(np.full((8, 6, 6), 1.5), np.float32)
    return graph.emit("LayerNormalization", value, ones, attrs={"axis": 1})


@net(2, 6)
def norm_of_merged_channels(graph: Graph, value: str) -> str:
    rows = graph.emit("Reshape", value, graph.ints(-1, 2, 144))
    vectors = (graph.constant([1.5, 1.5], np.float32), graph.constant([0.1, 0.1], np.float32))
    return graph.emit("Reshape", graph.emit("InstanceNormalization", rows, *vectors), graph.ints(-1, 8, 6, 6))


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[str, Model]:
    return request.param, model(request.param)


def test_the_groups_are_found(case: tuple[str, Model]) -> None:
    name, imported = case
    assert [g.size for g in imported.architecture.groups] == NETS[name].groups, imported.notes


def test_cuts_equal_the_masked_original(case: tuple[str, Model]) -> None:
    _, imported = case
    for density in (0.25, 0.5, 0.75, 0.001):
        for size in (2, 7):
            assert cut_error(imported, random_selection(imported, density, seed=size), size) < 1e-5
