"""Norms and activations in primitives become one operator where they are exactly that, and stay where they are not."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.oracles.cutting import distance, outputs

F32 = np.dtype(np.float32)
Build = Callable[[Graph, str], str]
SHAPE = (6, 4, 4)


def random(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def import_built(build: Build, shape: tuple[int, ...] = SHAPE) -> Model:
    """The import of a layer between a product per channel and a matrix; its numbers are compared."""
    graph = Graph(inputs=[Port("image", F32, ("batch", *shape))], opset=18)
    graph.initializers.update(
        w=random(math.prod(shape), 3), s=random(shape[0]), t=random(shape[-1]), u=random(shape[-1])
    )
    value = build(graph, graph.emit("Tanh", "image"))
    graph.outputs = [Port(graph.emit("MatMul", graph.emit("Flatten", value), "w"), F32, ("batch", 3))]
    model = import_onnx(graph.to_bytes(), "net")
    x = np.random.default_rng(1).standard_normal((7, *shape)).astype(np.float32)
    before = OnnxSession(graph.to_bytes()).run({"image": x})[graph.outputs[0].name]
    assert distance(outputs(model.graph, x), before) < 1e-5
    return model


def ops(build: Build, shape: tuple[int, ...] = SHAPE) -> list[str]:
    """The operators between the first and the last two."""
    return [n.op for n in import_built(build, shape).graph.nodes][1:-2]


def root(g: Graph, x: str, *, inverse: bool, axes: tuple[int, ...] = (-1,), power: bool = False) -> str:
    square = g.emit("Pow", x, g.scalar(2)) if power else g.emit("Mul", x, x)
    shifted = g.emit("Add", g.emit("ReduceMean", square, g.ints(*axes)), g.scalar(1e-5))
    if power:
        return g.emit("Pow", shifted, g.scalar(-0.5 if inverse else 0.5))
    value = g.emit("Sqrt", shifted)
    return g.emit("Reciprocal", value) if inverse else value


def centre(g: Graph, x: str, axes: tuple[int, ...] = (-1,)) -> str:
    return g.emit("Sub", x, g.emit("ReduceMean", x, g.ints(*axes)))


def rms(inverse: bool, power: bool) -> Build:
    def build(g: Graph, x: str) -> str:
        return g.emit("Mul", "t", g.emit("Mul" if inverse else "Div", x, root(g, x, inverse=inverse, power=power)))

    return build


def layer(inverse: bool, power: bool) -> Build:
    def build(g: Graph, x: str) -> str:
        c = centre(g, x)
        scaled = g.emit("Mul", g.emit("Mul" if inverse else "Div", c, root(g, c, inverse=inverse, power=power)), "t")
        return g.emit("Add", scaled, "u")

    return build


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("make", "op"), [(rms, "RMSNormalization"), (layer, "LayerNormalization")])
def test_norms_over_the_last_axis(make: Callable[[bool, bool], Build], op: str, inverse: bool, power: bool) -> None:
    model = import_built(make(inverse, power))
    assert [n.op for n in model.graph.nodes] == ["Tanh", op, "Flatten", "MatMul"]
    assert {t.name: t.kind for t in model.architecture.tensors}["t"] == "norm_scale"


def test_a_norm_over_channels_stands_between_transposes() -> None:
    def build(g: Graph, x: str) -> str:
        c = centre(g, x, (1,))
        value = g.emit("Div", c, root(g, c, inverse=False, axes=(1,)))
        return g.emit("Mul", value, g.emit("Unsqueeze", "s", g.ints(1, 2)))

    assert ops(build) == ["Transpose", "LayerNormalization", "Transpose"]


def test_a_norm_without_vectors_gets_ones() -> None:
    assert ops(lambda g, x: g.emit("Div", centre(g, x), root(g, centre(g, x), inverse=False))) == ["LayerNormalization"]


def test_a_variance_that_a_reshape_gives_its_axis_back() -> None:
    def build(g: Graph, x: str) -> str:
        c = centre(g, x)
        mean = g.emit("ReduceMean", g.emit("Mul", c, c), g.ints(3), attrs={"keepdims": 0})
        batch = g.emit("Gather", g.emit("Shape", x), g.ints(0), attrs={"axis": 0})
        variance = g.emit("Reshape", mean, g.emit("Concat", batch, g.ints(6, 4, 1), attrs={"axis": 0}))
        return g.emit("Div", c, g.emit("Sqrt", g.emit("Add", variance, g.scalar(1e-5))))

    assert ops(build) == ["LayerNormalization"]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_group_norm_as_exporters_write_it(groups: int, affine: bool) -> None:
    def build(g: Graph, x: str) -> str:
        ones, zeros = g.constant(np.ones(groups), np.float32), g.constant(np.zeros(groups), np.float32)
        apart = g.emit("Reshape", x, g.ints(0, groups, -1))
        value = g.emit("Reshape", g.emit("InstanceNormalization", apart, ones, zeros), g.emit("Shape", x))
        if not affine:
            return value
        g.initializers["c"] = random(6, 1, 1)
        value = g.emit("Mul", value, g.emit("Unsqueeze", "s", g.ints(1, 2)))
        return g.emit("Add", value, "c")

    model = import_built(build)
    (node,) = [n for n in model.graph.nodes if n.op == "GroupNormalization"]
    assert node.attrs["num_groups"] == groups
    assert {"s", "c"} <= set(model.tensors) if affine else True
    assert not {"InstanceNormalization", "Mul", "Add"} & {n.op for n in model.graph.nodes}


def gelu(g: Graph, x: str, half_first: bool, divide: bool) -> str:
    inner = g.emit("Div", x, g.scalar(math.sqrt(2))) if divide else g.emit("Mul", x, g.scalar(math.sqrt(0.5)))
    curve = g.emit("Add", g.emit("Erf", inner), g.scalar(1))
    if half_first:
        return g.emit("Mul", g.emit("Mul", g.scalar(0.5), x), curve)
    return g.emit("Mul", g.emit("Mul", x, curve), g.scalar(0.5))


@pytest.mark.parametrize("half_first", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_gelu_by_erf(half_first: bool, divide: bool) -> None:
    assert ops(lambda g, x: gelu(g, x, half_first, divide)) == ["Gelu"]


@pytest.mark.parametrize("factored", [False, True])
def test_gelu_by_tanh(factored: bool) -> None:
    def build(g: Graph, x: str) -> str:
        if factored:
            inner = g.emit("Mul", x, g.emit("Add", g.emit("Mul", g.emit("Mul", x, x), g.scalar(0.044715)), g.scalar(1)))
        else:
            inner = g.emit("Add", x, g.emit("Mul", g.scalar(0.044715), g.emit("Pow", x, g.scalar(3))))
        curve = g.emit("Tanh", g.emit("Mul", g.scalar(math.sqrt(2 / math.pi)), inner))
        return g.emit("Mul", g.emit("Mul", g.scalar(0.5), x), g.emit("Add", g.scalar(1), curve))

    (node,) = [n for n in import_built(build).graph.nodes if n.op == "Gelu"]
    assert node.attrs["approximate"] == "tanh"


def test_mish_with_the_softplus_of_torch() -> None:
    def build(g: Graph, x: str) -> str:
        soft = g.emit("Where", g.emit("Greater", x, g.scalar(20)), x, g.emit("Softplus", x))
        return g.emit("Mul", x, g.emit("Tanh", soft))

    assert ops(build) == ["Mish"]


def test_a_bound_that_no_usual_number_reaches_stays() -> None:
    def build(g: Graph, x: str) -> str:
        return g.emit("Where", g.emit("Greater", x, g.scalar(60)), g.scalar(60), g.emit("Softplus", x))

    assert "Where" in ops(build)


def _unlike(change: str) -> Build:
    """Something that is nearly a known operator."""

    def build(g: Graph, x: str) -> str:
        if change in ("other root", "other factor", "other operand"):
            divisor = 1.4 if change == "other root" else math.sqrt(2)
            curve = g.emit("Add", g.emit("Erf", g.emit("Div", x, g.scalar(divisor))), g.scalar(1))
            left = g.emit("Neg", x) if change == "other operand" else x
            return g.emit("Mul", g.emit("Mul", left, curve), g.scalar(0.6 if change == "other factor" else 0.5))
        if change == "sum":
            shifted = g.emit("Add", g.emit("ReduceSum", g.emit("Mul", x, x), g.ints(-1)), g.scalar(1e-5))
            return g.emit("Div", x, g.emit("Sqrt", shifted))
        if change == "epsilon outside":
            mean = g.emit("Sqrt", g.emit("ReduceMean", g.emit("Mul", x, x), g.ints(-1)))
            return g.emit("Div", x, g.emit("Add", mean, g.scalar(1e-5)))
        if change == "other axes":
            return g.emit("Div", centre(g, x, (2,)), root(g, centre(g, x, (2,)), inverse=False, axes=(3,)))
        soft = g.emit("Where", g.emit("Greater", x, g.scalar(0.5)), x, g.emit("Softplus", x))
        return g.emit("Mul", x, g.emit("Tanh", soft))

    return build


@pytest.mark.parametrize(
    "change", ["other root", "other factor", "other operand", "sum", "epsilon outside", "other axes", "early linear"]
)
def test_what_is_nearly_a_pattern_stays(change: str) -> None:
    operators = set(ops(_unlike(change)))
    assert not operators & {"Gelu", "Mish", "GroupNormalization"}
    assert not operators & {"LayerNormalization", "RMSNormalization"} or change == "other axes"


def test_a_value_within_a_pattern_that_something_else_reads() -> None:
    def build(g: Graph, x: str) -> str:
        c = centre(g, x)
        return g.emit("Add", g.emit("Div", c, root(g, c, inverse=False)), c)

    assert sorted(ops(build)) == ["Add", "LayerNormalization", "ReduceMean", "Sub"]
