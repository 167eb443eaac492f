"""Every model comes out in one form: names by the contract, opset 17, constants folded, the same numbers."""

from collections.abc import Callable

import numpy as np
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import RESERVED_NAMES
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.oracles.cutting import distance, outputs

F32 = np.dtype(np.float32)


def random(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def model_of(build: Callable[[Graph], str], *shape: int, out: int = 2, opset: int = 17) -> tuple[Model, Graph]:
    """The import of a graph whose nodes `build` emits, and that graph."""
    graph = Graph(inputs=[Port("image", F32, ("batch", *shape))], opset=opset)
    graph.outputs = [Port(build(graph), F32, ("batch", out))]
    return import_onnx(graph.to_bytes(), "net"), graph


def same(model: Model, graph: Graph) -> bool:
    """Whether the import computes what the graph computed, at a batch size that the import never saw."""
    x = np.random.default_rng(1).standard_normal((7, *model.architecture.input_shape)).astype(np.float32)
    before = OnnxSession(graph.to_bytes()).run({"image": x})[graph.outputs[0].name]
    return distance(outputs(model.graph, x), before) < 1e-5


def _norm_by(power: Callable[[Graph, str], str]) -> Callable[[Graph], str]:
    """A norm like LayerNormalization, but by another power than the square."""

    def build(graph: Graph) -> str:
        hidden = linear(graph, "image", 3, 6)
        rest = graph.emit("Sub", hidden, graph.emit("ReduceMean", hidden, attrs={"axes": [-1]}))
        spread = graph.emit("ReduceMean", power(graph, rest), attrs={"axes": [-1]})
        root = graph.emit("Sqrt", graph.emit("Add", spread, graph.constant(1e-5, np.float32)))
        for name in ("scale", "shift"):
            graph.initializers[name] = random(6) + np.float32(1)
        scaled = graph.emit("Mul", graph.emit("Div", rest, root), "scale")
        return linear(graph, graph.emit("Add", scaled, "shift"), 6, 2, "last")

    return build


@pytest.mark.parametrize("exponent", [4, -2])
def test_what_the_optimiser_breaks_is_refused_with_a_way_out(exponent: int) -> None:
    with pytest.raises(ModelError, match=r"optimiser.*write powers .* as products"):
        model_of(_norm_by(lambda g, x: g.emit("Pow", x, g.constant(exponent, np.float32))), 3)
    model, graph = model_of(_norm_by(lambda g, x: g.emit("Reciprocal", g.emit("Mul", x, x))), 3)
    assert same(model, graph)


def linear(graph: Graph, value: str, inside: int, outside: int, name: str = "w") -> str:
    graph.initializers[name] = random(inside, outside)
    return graph.emit("MatMul", value, name)


@pytest.mark.parametrize("name", [*sorted(RESERVED_NAMES), "a::b", "__metadata__"])
def test_reserved_names_are_renamed(name: str) -> None:
    def build(graph: Graph) -> str:
        graph.initializers[name] = random(3, 4)
        hidden = graph.emit("MatMul", "image", name)
        return linear(graph, graph.emit("Relu", hidden, out="y" if name != "y" else "lr"), 4, 2, "last")

    model, graph = model_of(build, 3)
    value_names = {*model.tensors, *(o for n in model.graph.nodes for o in n.outputs)}
    assert not (value_names - {"logits"}) & RESERVED_NAMES
    assert not any("::" in n for n in value_names)
    assert any(name in note for note in model.notes)
    assert same(model, graph)


@pytest.mark.parametrize(("op", "number"), [("Sub", 0), ("Div", 1)])
@pytest.mark.parametrize("left", [False, True])
def test_a_neutral_number_goes_from_its_own_side_alone(op: str, number: float, left: bool) -> None:
    def build(graph: Graph) -> str:
        operands = [graph.scalar(number), "image"] if left else ["image", graph.scalar(number)]
        return linear(graph, graph.emit(op, *operands), 3, 2)

    model, graph = model_of(build, 3)
    assert [n.op for n in model.graph.nodes] == [*[op] * left, "MatMul"]
    assert same(model, graph)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_a_softmax_at_the_end_goes(op: str) -> None:
    model, graph = model_of(lambda g: g.emit(op, linear(g, "image", 3, 2), attrs={"axis": 1}), 3)
    x = random(5, 3)
    old = OnnxSession(graph.to_bytes()).run({"image": x})[graph.outputs[0].name]
    assert [n.op for n in model.graph.nodes] == ["MatMul"]
    assert any(op in note for note in model.notes)
    np.testing.assert_array_equal(outputs(model.graph, x).argmax(1), old.argmax(1))


def test_a_softmax_over_places_stays() -> None:
    model, graph = model_of(lambda g: g.emit("Softmax", linear(g, "image", 3, 4), attrs={"axis": -1}), 2, 3)
    assert [n.op for n in model.graph.nodes] == ["MatMul", "Softmax"]
    assert same(model, graph)


def test_shape_arithmetic_becomes_a_flatten() -> None:
    def build(graph: Graph) -> str:
        batch = graph.emit("Gather", graph.emit("Shape", "image"), graph.ints(0), attrs={"axis": 0})
        target = graph.emit("Concat", batch, graph.ints(-1), attrs={"axis": 0})
        return linear(graph, graph.emit("Reshape", "image", target), 12, 2)

    model, graph = model_of(build, 3, 2, 2)
    assert [n.op for n in model.graph.nodes] == ["Flatten", "MatMul"]
    assert same(model, graph)


def test_samples_and_places_as_one_axis_are_no_flatten() -> None:
    """torch's `x.flatten(0, 1)`: the first axis follows the batch, the second is one of the value's own."""

    def build(graph: Graph) -> str:
        rows = linear(graph, graph.emit("Reshape", "image", graph.ints(-1, 3)), 3, 4)
        return linear(graph, graph.emit("Reshape", rows, graph.ints(-1, 20)), 20, 2, "last")

    model, graph = model_of(build, 5, 3)
    assert [n.op for n in model.graph.nodes] == ["Reshape", "MatMul", "Reshape", "MatMul"]
    assert same(model, graph)


def test_an_operator_that_opset_17_lacks_is_named() -> None:
    def build(graph: Graph) -> str:
        flipped = graph.emit("BitwiseNot", graph.emit("Cast", "image", attrs={"to": 6}))
        return linear(graph, graph.emit("Cast", flipped, attrs={"to": 1}), 4, 2)

    with pytest.raises(ModelError, match=r"BitwiseNot.*opset 17"):
        model_of(build, 4, opset=20)


def test_merged_uniform_vectors_are_separated() -> None:
    """Optimising exporters let fresh norms of different layers share one initialiser of ones."""

    def build(graph: Graph) -> str:
        ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
        graph.initializers.update(one=ones, zero=zeros, w1=random(3, 3, 1, 1))
        value = graph.emit("BatchNormalization", "image", "one", "zero", "zero", "one")
        value = graph.emit("BatchNormalization", graph.emit("Conv", value, "w1"), "one", "zero", "zero", "one")
        return linear(graph, graph.emit("Flatten", value), 12, 2)

    model, graph = model_of(build, 3, 2, 2)
    assert len(model.tensors) == 10
    assert same(model, graph)


def test_a_matrix_that_two_layers_read_stays_tied() -> None:
    def build(graph: Graph) -> str:
        hidden = linear(graph, "image", 3, 3, "tied")
        return linear(graph, graph.emit("MatMul", graph.emit("Relu", hidden), "tied"), 3, 2)

    model, graph = model_of(build, 3)
    assert list(model.tensors) == ["tied", "w"]
    assert same(model, graph)


def test_a_zero_bias_that_nobody_trains_goes() -> None:
    def build(graph: Graph) -> str:
        graph.initializers["k"] = random(4, 3, 2, 2)
        bias = graph.emit("Expand", graph.scalar(0.0), graph.ints(4))
        return linear(graph, graph.emit("Flatten", graph.emit("Conv", "image", "k", bias)), 4, 2)

    model, graph = model_of(build, 3, 2, 2)
    assert list(model.tensors) == ["k", "w"]
    assert same(model, graph)


def test_training_mode_is_refused() -> None:
    def build(graph: Graph) -> str:
        vectors = ["s", "b", "m", "v"]
        graph.initializers.update({v: np.ones(3, np.float32) for v in vectors})
        value, _, _ = graph.emit_many("BatchNormalization", "image", *vectors, outputs=3, attrs={"training_mode": 1})
        return linear(graph, graph.emit("Flatten", value), 12, 2)

    with pytest.raises(ModelError, match=r"training mode.*module\.eval"):
        model_of(build, 3, 2, 2)


def _size(graph: Graph, value: str) -> str:
    """The batch of a value, as one number."""
    return graph.emit("Gather", graph.emit("Shape", value), graph.constant(0, np.int64))


def _smallest(graph: Graph) -> str:
    return graph.emit("Min", _size(graph, "image"), graph.constant(2, np.int64))


def _first_two(graph: Graph) -> str:
    return _size(graph, graph.emit("Slice", "image", graph.ints(0), graph.ints(2)))


def _remainder(graph: Graph) -> str:
    return graph.emit("Add", graph.emit("Mod", _size(graph, "image"), graph.constant(2, np.int64)), graph.ints(1))


def _mean(graph: Graph) -> str:
    mean = graph.emit("ReduceMean", graph.emit("Mul", "image", graph.scalar(30)), attrs={"keepdims": 0})
    return graph.emit(
        "Max", graph.emit("Cast", graph.emit("Div", mean, graph.scalar(30)), attrs={"to": 7}), graph.ints(1)
    )


@pytest.mark.parametrize("number", [_smallest, _first_two, _remainder, _mean])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_number_that_follows_batch_or_data_stays_computed(number: Callable[[Graph], str], batch: int) -> None:
    model, graph = model_of(
        lambda g: linear(g, g.emit("Div", "image", g.emit("Cast", number(g), attrs={"to": 1})), 6, 2), 6
    )
    x = np.arange(6 * batch, dtype=np.float32).reshape(batch, 6)
    before = OnnxSession(graph.to_bytes()).run({"image": x})[graph.outputs[0].name]
    assert distance(outputs(model.graph, x), before) < 1e-5


def test_an_axis_of_one_sample_stays() -> None:
    def build(graph: Graph) -> str:
        return linear(graph, graph.emit("Squeeze", graph.emit("Unsqueeze", "image", graph.ints(1))), 3, 2)

    model, graph = model_of(build, 3)
    assert same(model, graph)


def test_a_sum_over_nothing_goes() -> None:
    def build(graph: Graph) -> str:
        value = graph.emit("ReduceSum", linear(graph, "image", 3, 4), attrs={"noop_with_empty_axes": 1})
        return linear(graph, value, 4, 2, "last")

    model, graph = model_of(build, 3)
    assert [n.op for n in model.graph.nodes] == ["MatMul", "MatMul"]
    assert [g.size for g in model.architecture.groups] == [4]
    assert same(model, graph)


def test_a_sum_over_computed_axes_is_named() -> None:
    def build(graph: Graph) -> str:
        number = graph.emit("Cast", graph.emit("ReduceMin", "image", attrs={"keepdims": 0}), attrs={"to": 7})
        axis = graph.emit("Add", graph.emit("Mul", number, graph.ints(0)), graph.ints(2))
        return linear(graph, graph.emit("ReduceSum", "image", axis, attrs={"keepdims": 0}), 3, 2)

    with pytest.raises(ModelError, match=r"ReduceSum.*computed axes"):
        model_of(build, 3, 4)
