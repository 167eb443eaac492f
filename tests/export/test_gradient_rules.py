"""Every operator's gradient against torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedprune.architecture import Architecture
from fedprune.errors import ModelError
from fedprune.session import Session
from fedprune_export import convolution_gradients, training  # noqa: F401 (registers the rules)
from fedprune_export.convolution_gradients import Formulation
from fedprune_export.differentiate import Tape
from fedprune_export.graph import Graph, Node, Port
from fedprune_export.imported import Model
from fedprune_export.pooling_gradients import Window

pytestmark = pytest.mark.torch

Oracle = Callable[..., torch.Tensor]
Arrays = dict[str, np.ndarray[Any, Any]]
F = torch.nn.functional
few = settings(max_examples=40, deadline=None)


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) + offset).astype(np.float32)


def differentiated(
    nodes: Sequence[Node], data: Arrays, shapes: dict[str, tuple[int | str, ...]], constants: Arrays
) -> Session:
    """A session of y and the gradients of all data by the gradient `dy` of y."""
    graph = Graph(initializers=dict(constants), nodes=list(nodes), opset=17)
    graph.outputs = [Port("y", np.dtype(np.float32), ())]
    arch = Architecture("op", (), (), (), (), (1,), 1)
    out = Graph()
    tape = Tape(Model(graph, arch), out)
    for name, array in data.items():
        for dim, size in zip(shapes[name], array.shape, strict=True):
            if isinstance(dim, str) and dim != "N":
                tape.symbol(dim, size)
        out.inputs.append(Port(name, array.dtype, shapes[name]))
        tape.enter(name, name, shapes[name], wanted=True)
    tape.forward()
    out.inputs.append(Port("dy", np.dtype(np.float32), tape.shape("y")))
    tape.add("y", "dy")
    tape.backward()
    out.emit("Identity", tape.value("y"), out="result")
    out.outputs.append(Port("result", np.dtype(np.float32), tape.shape("y")))
    for name in data:
        gradient = tape.gradient(name)
        assert gradient is not None, name
        out.emit("Identity", gradient, out=f"{name}::gradient")
        out.outputs.append(Port(f"{name}::gradient", np.dtype(np.float32), shapes[name]))
    return Session(out.to_bytes(), training=True)


def reference(oracle: Oracle, data: Arrays, dtype: torch.dtype, dy: np.ndarray[Any, Any] | None) -> Arrays:
    """The oracle's result and gradients; without dy only the result."""
    leaves = {k: torch.tensor(v, dtype=dtype, requires_grad=True) for k, v in data.items()}
    y = oracle(**leaves)
    out = {"result": y.detach().numpy()}
    if dy is not None:
        y.backward(torch.tensor(dy, dtype=dtype))
        out |= {f"{k}::gradient": v.grad.numpy() for k, v in leaves.items() if v.grad is not None}
    return out


def error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm((got - want).ravel()) / max(float(np.linalg.norm(want.ravel())), 1e-30))


def check(
    nodes: Sequence[Node],
    oracle: Oracle,
    data: Arrays,
    shapes: dict[str, tuple[int | str, ...]] | None = None,
    constants: Arrays | None = None,
    *,
    sums: bool = False,
) -> None:
    """Result and gradients are as near to float64 as 1e-6, or twice torch's own float32 error.

    With `sums` (operators that are linear in each input) an error is also fine if it is five roundings of the sum of
    magnitudes: where a sum cancels to next to nothing, its relative error says nothing.
    """
    shapes = shapes or {k: v.shape for k, v in data.items()}
    want = reference(oracle, data, torch.float64, None)["result"]
    dy = normal(*want.shape, seed=99)
    exact, usual = (reference(oracle, data, t, dy) for t in (torch.float64, torch.float32))
    got = differentiated(nodes, data, shapes, constants or {}).run({**data, "dy": dy})
    sizes = reference(oracle, {k: abs(v) for k, v in data.items()}, torch.float64, abs(dy)) if sums else {}
    for name, value in exact.items():
        cancelled = 3e-7 * float(np.linalg.norm(sizes[name])) / float(np.linalg.norm(value)) if sums else 0.0
        assert error(got[name], value) <= max(1e-6, cancelled, 2 * error(usual[name], value)), name


def node(op: str, *inputs: str, out: str = "y", **attrs: Any) -> Node:
    return Node(op, list(inputs), [out], attrs, f"the_{op}")


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def floats(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)


# -- element-wise ---------------------------------------------------------------------------------------------------

UNARY: dict[str, tuple[dict[str, Any], Oracle]] = {
    "Relu": ({}, torch.relu),
    "LeakyRelu": ({"alpha": 0.1}, lambda x: F.leaky_relu(x, 0.1)),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "Neg": ({}, torch.neg),
    "HardSigmoid": ({"alpha": 1 / 6, "beta": 0.5}, F.hardsigmoid),
    "HardSwish": ({}, F.hardswish),
    "Identity": ({}, lambda x: x * 1),
    "Dropout": ({}, lambda x: x * 1),
}


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7), (2, 3, 8, 8)])
def test_elementwise_operators(op: str, shape: tuple[int, ...]) -> None:
    attrs, oracle = UNARY[op]
    check([node(op, "x", **attrs)], lambda x: oracle(x), {"x": 3 * normal(*shape)}, {"x": ("N", "c", *shape[2:])})


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "HardSwish"])
def test_gradient_at_exactly_zero_is_torchs(op: str) -> None:
    attrs, oracle = UNARY[op]
    check([node(op, "x", **attrs)], lambda x: oracle(x), {"x": np.array([[-1, 0, 2], [0, 0, -3]], np.float32)})


def test_square_root() -> None:
    check([node("Sqrt", "x")], lambda x: x.sqrt(), {"x": np.abs(normal(4, 5)) + 0.1})


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0)])
def test_clip_is_hardtanh(low: float, high: float) -> None:
    x = 4 * normal(5, 40)
    x[0, :4] = [low, high, low, high]
    oracle = lambda x: F.hardtanh(x, low, high)  # noqa: E731
    check([node("Clip", "x", "low", "high")], oracle, {"x": x}, None, {"low": floats(low), "high": floats(high)})


def test_clip_without_an_upper_bound() -> None:
    check([node("Clip", "x", "low")], lambda x: x.clamp(min=0.5), {"x": normal(5, 9)}, None, {"low": floats(0.5)})


def test_clip_without_a_lower_bound() -> None:
    high = {"high": floats(0.5)}
    check([node("Clip", "x", "", "high")], lambda x: x.clamp(max=0.5), {"x": normal(5, 9)}, None, high)


BINARY: dict[str, Oracle] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    full = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    pair = []
    for _ in range(2):
        kept = tuple(d if draw(st.booleans()) else 1 for d in full)
        pair.append(kept[draw(st.integers(0, len(full) - 1)) :])
    return pair[0], pair[1]


@pytest.mark.parametrize("op", BINARY)
@few
@given(shapes=broadcast_pairs())
def test_arithmetic_broadcasts(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    data = {"a": normal(*shapes[0], seed=1), "b": np.abs(normal(*shapes[1], seed=2)) + np.float32(0.5)}
    check([node(op, "a", "b")], lambda a, b: BINARY[op](a, b), data, sums=True)


@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_of_a_value_with_itself(op: str) -> None:
    check([node(op, "a", "a")], lambda a: BINARY[op](a, a), {"a": np.abs(normal(3, 4)) + np.float32(0.5)})


def test_gradients_of_a_value_that_is_read_three_times_add_up() -> None:
    nodes = [node("Relu", "x", out="r"), node("Sigmoid", "x", out="s"), node("Mul", "r", "s", out="m")]
    check([*nodes, node("Add", "m", "x")], lambda x: x.relu() * x.sigmoid() + x, {"x": normal(4, 5)})


# -- matrix products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ta", [0, 1])
@pytest.mark.parametrize("tb", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (4, 6), (4, 1)])
def test_gemm(ta: int, tb: int, alpha: float, beta: float, bias: tuple[int, ...] | None) -> None:
    data = {"a": normal(*((5, 4) if ta else (4, 5))), "b": normal(*((6, 5) if tb else (5, 6)), seed=1)}
    if bias is not None:
        data["c"] = normal(*bias, seed=2)

    def oracle(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        y = alpha * (a.T if ta else a) @ (b.T if tb else b)
        return y if c is None else y + beta * c

    check([node("Gemm", *data, transA=ta, transB=tb, alpha=alpha, beta=beta)], oracle, data, sums=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [((4, 5), (5, 3)), ((2, 4, 5), (5, 3)), ((2, 4, 5), (2, 5, 3)), ((2, 3, 4, 5), (3, 5, 2)), ((4, 5), (2, 5, 3))],
)
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check([node("MatMul", "a", "b")], lambda a, b: a @ b, {"a": normal(*a), "b": normal(*b, seed=1)}, sums=True)


# -- shapes ---------------------------------------------------------------------------------------------------------

SHAPE = (2, 6, 4, 5)
SHAPES: dict[str, tuple[Node, Arrays, Oracle]] = {
    "flatten": (node("Flatten", "x", axis=1), {}, lambda x: x.flatten(1)),
    "flatten_middle": (node("Flatten", "x", axis=2), {}, lambda x: x.reshape(12, 20)),
    "reshape_batch_kept": (node("Reshape", "x", "s"), {"s": ints(0, -1)}, lambda x: x.reshape(2, -1)),
    "reshape_static_features": (node("Reshape", "x", "s"), {"s": ints(-1, 120)}, lambda x: x.reshape(2, 120)),
    "reshape_maps": (node("Reshape", "x", "s"), {"s": ints(0, 0, 20)}, lambda x: x.reshape(2, 6, 20)),
    "reshape_splits_a_map": (node("Reshape", "x", "s"), {"s": ints(0, 0, 2, 2, 5)}, lambda x: x.reshape(2, 6, 2, 2, 5)),
    "reshape_inserts_one": (node("Reshape", "x", "s"), {"s": ints(-1, 1, 6, 4, 5)}, lambda x: x.reshape(2, 1, 6, 4, 5)),
    "unsqueeze": (node("Unsqueeze", "x", "a"), {"a": ints(1, -1)}, lambda x: x[:, None, ..., None]),
    "transpose": (node("Transpose", "x", perm=[0, 2, 3, 1]), {}, lambda x: x.permute(0, 2, 3, 1)),
    "transpose_default": (node("Transpose", "x"), {}, lambda x: x.permute(3, 2, 1, 0)),
    "pad": (node("Pad", "x", "p"), {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}, lambda x: F.pad(x, (2, 0, 1, 3))),
    "pad_with_a_value": (
        node("Pad", "x", "p", "v"),
        {"p": ints(0, 0, 1, 0, 0, 0, 0, 1), "v": floats(2.0)},
        lambda x: F.pad(x, (0, 1, 1, 0), value=2.0),
    ),
    "pad_cuts": (node("Pad", "x", "p"), {"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}, lambda x: x[:, :, 1:, :-2]),
    "slice": (
        node("Slice", "x", "b", "e", "a"),
        {"b": ints(1, -3), "e": ints(3, 2**31), "a": ints(2, 3)},
        lambda x: x[:, :, 1:3, -3:],
    ),
    "global_average": (node("GlobalAveragePool", "x"), {}, lambda x: x.mean((2, 3), keepdim=True)),
    "mean": (node("ReduceMean", "x", axes=[2, 3], keepdims=0), {}, lambda x: x.mean((2, 3))),
    "mean_kept": (node("ReduceMean", "x", axes=[-1], keepdims=1), {}, lambda x: x.mean(3, keepdim=True)),
    "mean_axes_as_input": (node("ReduceMean", "x", "a", keepdims=0), {"a": ints(2)}, lambda x: x.mean(2)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shape_operators(case: str) -> None:
    op, constants, oracle = SHAPES[case]
    check([op], lambda x: oracle(x), {"x": normal(*SHAPE)}, {"x": ("N", "c", 4, 5)}, constants)


def test_squeeze() -> None:
    data, shapes = {"x": normal(3, 5, 1, 1)}, {"x": ("N", "c", 1, 1)}
    check([node("Squeeze", "x", "a")], lambda x: x[..., 0, 0], data, shapes, {"a": ints(-1, 2)})


def test_a_reshape_that_splits_channels_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Reshape"):
        differentiated(
            [node("Reshape", "x", "s")], {"x": normal(*SHAPE)}, {"x": ("N", "c", 4, 5)}, {"s": ints(0, 2, 3, 4, 5)}
        )


def test_padding_channels_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Pad"):
        differentiated(
            [node("Pad", "x", "p")], {"x": normal(*SHAPE)}, {"x": ("N", "c", 4, 5)}, {"p": ints(0, 1, 0, 0, 0, 1, 0, 0)}
        )


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Erf"):
        differentiated([node("Erf", "x")], {"x": normal(3)}, {"x": ("N",)}, {})


def test_a_constant_over_channels_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Mul"):
        differentiated([node("Mul", "x", "k")], {"x": normal(2, 6)}, {"x": ("N", "c")}, {"k": normal(6)})


@pytest.mark.parametrize("axis", [1, -1])
def test_concat_cuts_the_gradient_where_pieces_meet(axis: int) -> None:
    data = {"a": normal(2, 3, 4), "b": normal(2, 3 if axis == -1 else 5, 4, seed=1), "c": normal(2, 3, 4, seed=2)}
    shapes = {"a": ("N", "c1", 4), "b": ("N", "c1" if axis == -1 else "c2", 4), "c": ("N", "c1", 4)}
    check([node("Concat", "a", "b", "c", axis=axis)], lambda a, b, c: torch.cat([a, b, c], axis), data, shapes)


# -- pooling --------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return {
        "size": draw(st.tuples(st.integers(3, 8), st.integers(3, 8))),
        "kernel": kernel,
        "strides": kernel if draw(st.booleans()) else draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "pads": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "constant": draw(st.sampled_from(["none", "some", "all"])),
    }


def pool_input(case: dict[str, Any], seed: int = 0) -> np.ndarray[Any, Any]:
    """Random numbers; with `some` of eight values, so that many windows have several maxima; or constant."""
    x = normal(3, 4, *case["size"], seed=seed)
    if case["constant"] == "some":
        x = np.round(x * 2).clip(-2, 2) / np.float32(2)
    return np.full_like(x, 0.25) if case["constant"] == "all" else x


def onnx_pool(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "kernel_shape": list(case["kernel"]),
        "strides": list(case["strides"]),
        "pads": [*case["pads"], *case["pads"]],
    }


@few
@given(case=pools())
def test_max_pool_gives_the_gradient_to_torchs_maximum(case: dict[str, Any]) -> None:
    oracle = lambda x: F.max_pool2d(x, case["kernel"], case["strides"], case["pads"])  # noqa: E731
    x = pool_input(case)
    check([node("MaxPool", "x", **onnx_pool(case))], oracle, {"x": x}, {"x": ("N", "c", *case["size"])})


@pytest.mark.parametrize("constant", ["some", "all"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1), (2, 1), (4, 4)])
def test_max_pool_on_flat_regions_is_bit_for_bit_torchs(constant: str, kernel: int, stride: int) -> None:
    x = pool_input({"size": (8, 8), "constant": constant}, seed=3)
    oracle = lambda x: F.max_pool2d(x, kernel, stride)  # noqa: E731
    want_y = reference(oracle, {"x": x}, torch.float32, None)["result"]
    dy = np.round(normal(*want_y.shape, seed=9) * 8)  # whole numbers: sums are exact in any order
    want = reference(oracle, {"x": x}, torch.float32, dy)["x::gradient"]
    pool = node("MaxPool", "x", kernel_shape=[kernel] * 2, strides=[stride] * 2)
    got = differentiated([pool], {"x": x}, {"x": ("N", "c", 8, 8)}, {}).run({"x": x, "dy": dy})
    np.testing.assert_array_equal(want, got["x::gradient"])


def test_max_pool_of_one_axis() -> None:
    oracle = lambda x: F.max_pool1d(x, 3, 2, 1)  # noqa: E731
    pool = node("MaxPool", "x", kernel_shape=[3], strides=[2], pads=[1, 1])
    check([pool], oracle, {"x": normal(2, 3, 11)}, {"x": ("N", "c", 11)})


def test_max_pool_with_dilation() -> None:
    oracle = lambda x: F.max_pool2d(x, 2, 1, 0, 2)  # noqa: E731
    pool = node("MaxPool", "x", kernel_shape=[2, 2], strides=[1, 1], dilations=[2, 2])
    check([pool], oracle, {"x": normal(2, 3, 6, 7)}, {"x": ("N", "c", 6, 7)})


@pytest.mark.parametrize("size", [5, 6, 7])
def test_max_pool_that_rounds_up(size: int) -> None:
    oracle = lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)  # noqa: E731
    pool = node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)
    check([pool], oracle, {"x": normal(2, 3, size, size)}, {"x": ("N", "c", size, size)})


@few
@given(case=pools(), counted=st.booleans())
def test_average_pool(case: dict[str, Any], counted: bool) -> None:
    oracle = lambda x: F.avg_pool2d(  # noqa: E731
        x, case["kernel"], case["strides"], case["pads"], count_include_pad=counted
    )
    pool = node("AveragePool", "x", **onnx_pool(case), count_include_pad=int(counted))
    check([pool], oracle, {"x": normal(2, 3, *case["size"])}, {"x": ("N", "c", *case["size"])}, sums=True)


def test_average_pool_of_one_axis() -> None:
    pool = node("AveragePool", "x", kernel_shape=[3], strides=[2])
    check([pool], lambda x: F.avg_pool1d(x, 3, 2), {"x": normal(2, 3, 12)}, {"x": ("N", "c", 12)})


# -- batch normalisation: gradients here, statistics in test_training -----------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5), (6, 4, 9), (4, 3, 6, 6), (4, 7, 1, 1), (32, 16, 8, 8)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_batch_norm(shape: tuple[int, ...], offset: float) -> None:
    c = shape[1]
    data = {"x": normal(*shape, offset=offset), "w": normal(c, seed=1), "b": normal(c, seed=2)}
    session = _batch_norm(data, ("N", "c", *shape[2:]))
    dy = normal(*shape, seed=3)

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, w, b, training=True)

    exact, usual = (reference(oracle, data, t, dy) for t in (torch.float64, torch.float32))
    feeds = {**data, "dy": dy, "m": np.zeros(c, np.float32), "v": np.ones(c, np.float32)}
    got = session.run(feeds)
    for name, value in exact.items():
        assert error(got[name], value) <= max(1e-6, 2 * error(usual[name], value)), name


def _batch_norm(data: Arrays, shape: tuple[int | str, ...]) -> Session:
    from fedprune.architecture import Axis, ChannelGroup, Segment, TensorKind, TensorSpec

    c = data["w"].size
    axes = (Axis((Segment(0, 0, c),)),)
    kinds = {"w": "norm_scale", "b": "norm_bias", "m": "stat_mean", "v": "stat_var"}
    specs = tuple(TensorSpec(n, TensorKind(k), axes) for n, k in kinds.items())
    arch = Architecture("op", (ChannelGroup("c", c),), specs, (), (), (1,), 1)
    graph = Graph(nodes=[node("BatchNormalization", "x", "w", "b", "m", "v", epsilon=1e-5)])
    graph.outputs = [Port("y", np.dtype(np.float32), ())]
    out = Graph()
    tape = Tape(Model(graph, arch), out)
    out.inputs = [Port("x", np.dtype(np.float32), shape)]
    tape.enter("x", "x", shape, wanted=True)
    for spec in specs:
        out.inputs.append(Port(spec.name, np.dtype(np.float32), tape.tensor_shape(spec)))
        tape.enter(spec.name, spec.name, tape.tensor_shape(spec), wanted=spec.kind.trainable)
    tape.forward()
    out.inputs.append(Port("dy", np.dtype(np.float32), shape))
    tape.add("y", "dy")
    tape.backward()
    out.emit("Identity", tape.value("y"), out="result")
    out.outputs.append(Port("result", np.dtype(np.float32), shape))
    for name in data:
        out.emit("Identity", tape.gradient(name) or "", out=f"{name}::gradient")
        out.outputs.append(Port(f"{name}::gradient", np.dtype(np.float32), tape.shape(name)))
    return Session(out.to_bytes(), training=True)


# -- convolution ----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.sampled_from([1, 2, 2]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel = each(1, 4)
    case = {
        "batch": draw(st.integers(1, 4)),
        "inputs": draw(st.integers(1, 5)),
        "outputs": draw(st.integers(1, 5)),
        "size": each(4, 9),
        "kernel": kernel,
        "strides": each(1, 3) if draw(st.booleans()) else (1,) * rank,
        "dilations": each(1, 2),
        "pads": tuple((draw(st.integers(0, k)), draw(st.integers(0, k))) for k in kernel),
        "bias": draw(st.booleans()),
    }
    spans = [d * (k - 1) + 1 for d, k in zip(case["dilations"], kernel, strict=True)]
    assume(all(s + sum(p) >= n for s, p, n in zip(case["size"], case["pads"], spans, strict=True)))
    return case


def check_convolution(case: dict[str, Any], groups: int = 1) -> None:
    rank = len(case["size"])
    data = {
        "x": normal(case["batch"], case["inputs"], *case["size"]),
        "w": normal(case["outputs"], case["inputs"] // groups, *case["kernel"], seed=1),
    }
    shapes: dict[str, tuple[int | str, ...]] = {
        "x": ("N", "c", *case["size"]),
        "w": ("o" if groups == 1 else "c", "c" if groups == 1 else 1, *case["kernel"]),
    }
    if case["bias"]:
        data["b"], shapes["b"] = normal(case["outputs"], seed=2), shapes["w"][:1]
    flat = [p for pad in reversed(case["pads"]) for p in pad]

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        function = F.conv1d if rank == 1 else F.conv2d
        return function(F.pad(x, flat), w, b, case["strides"], 0, case["dilations"], groups)

    attrs = {
        "kernel_shape": list(case["kernel"]),
        "strides": list(case["strides"]),
        "dilations": list(case["dilations"]),
        "pads": [p[0] for p in case["pads"]] + [p[1] for p in case["pads"]],
        "group": groups,
    }
    check([node("Conv", *data, **attrs)], oracle, data, shapes, sums=True)


@settings(max_examples=80, deadline=None)
@given(case=convolutions())
def test_convolution(case: dict[str, Any]) -> None:
    check_convolution(case)


@pytest.mark.parametrize("weight_gradient", ["taps", "columns", "convolution"])
@pytest.mark.parametrize("forward", ["operator", "columns"])
@settings(max_examples=25, deadline=None)
@given(case=convolutions())
def test_every_formulation_of_a_convolution(weight_gradient: Any, forward: Any, case: dict[str, Any]) -> None:
    plain = all(s == 1 for s in case["strides"])
    fits = all(
        p <= d * (k - 1) for pad, d, k in zip(case["pads"], case["dilations"], case["kernel"], strict=True) for p in pad
    )
    kinds: list[Any] = ["flipped", "columns", "transposed"] if plain and fits else ["transposed"]
    for input_gradient in kinds:
        chosen = Formulation(forward, input_gradient, weight_gradient)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution_gradients, "formulation", lambda *_, chosen=chosen: chosen)
            check_convolution(case)


@settings(max_examples=30, deadline=None)
@given(case=convolutions())
def test_depthwise_convolution_of_any_width(case: dict[str, Any]) -> None:
    channels = case["inputs"] + 1
    check_convolution({**case, "inputs": channels, "outputs": channels}, groups=channels)


def test_groups_of_several_channels_are_refused_by_name() -> None:
    data = {"x": normal(2, 4, 5, 5), "w": normal(6, 2, 3, 3)}
    with pytest.raises(ModelError, match="the_Conv"):
        differentiated([node("Conv", "x", "w", group=2)], data, {"x": ("N", "c", 5, 5), "w": ("o", 2, 3, 3)}, {})


def test_layers_of_common_shapes_keep_their_formulations() -> None:
    def square(size: int, k: int, pad: int, stride: int = 1) -> Window:
        out = (size + 2 * pad - k) // stride + 1
        return Window((size,) * 2, (k,) * 2, (stride,) * 2, (1, 1), ((pad, pad),) * 2, (out,) * 2)

    assert convolution_gradients.formulation(square(32, 3, 1), 16) == Formulation("operator", "flipped", "taps")
    assert convolution_gradients.formulation(square(4, 3, 1), 64) == Formulation("operator", "flipped", "columns")
    assert convolution_gradients.formulation(square(2, 3, 1), 64) == Formulation("columns", "columns", "columns")
    assert convolution_gradients.formulation(square(28, 5, 0), 1).weight_gradient == "convolution"
    assert convolution_gradients.formulation(square(14, 5, 2), 32) == Formulation("operator", "transposed", "taps")
    assert convolution_gradients.formulation(square(32, 3, 1, 2), 16).input_gradient == "transposed"
