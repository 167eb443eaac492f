"""Gradients of element-wise, matrix and shape operators against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.runtime.session import Session
from fedprune_export.autodiff.tape import RULES, rule
from fedprune_export.ir.graph import Node
from support.oracles.differentiation import Arrays, Oracle, check, differentiated, floats, ints, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional
few = settings(max_examples=40, deadline=None)


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


@pytest.mark.parametrize("side", ["min", "max"])
def test_clip_with_one_bound_passes_the_gradient_at_the_bound_as_torchs_clamp(side: str) -> None:
    inputs = ["x", "bound"] if side == "min" else ["x", "", "bound"]
    x = np.array([[0.5, 0.25, 0.5], [-3.0, 0.5, 4.0]], np.float32)
    check([node("Clip", *inputs)], lambda x: x.clamp(**{side: 0.5}), {"x": x}, None, {"bound": floats(0.5)})


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


def batch_of_x(*more: Node) -> list[Node]:
    """The batch as `n`, computed from the input's shape, and what follows from it."""
    return [node("Shape", "x", out="shape"), node("Gather", "shape", "first", out="n"), *more]


def differentiated_at_the_batch(nodes: list[Node], x: np.ndarray[Any, Any], constants: Arrays) -> Session:
    shape = ("N", *x.shape[1:])
    return differentiated(nodes, {"x": x}, {"x": shape}, {"first": ints(0), **constants})


@pytest.mark.parametrize(("batches", "rest"), [(1, [-1]), (1, [6, 20]), (1, [2, 3, -1]), (6, [4, 5]), (6, [-1])])
def test_a_reshape_to_a_multiple_of_the_batch(batches: int, rest: list[int]) -> None:
    x = normal(2, 6, 4, 5)
    nodes = batch_of_x(
        node("Mul", "n", "times", out="m"),
        node("Concat", "m", "rest", out="s", axis=0),
        node("Reshape", "x", "s"),
    )
    session = differentiated_at_the_batch(nodes, x, {"times": ints(batches), "rest": ints(*rest)})
    want = x.reshape(2 * batches, *rest)
    got = session.run({"x": x, "dy": 2 * want})
    np.testing.assert_array_equal(want, got["result"])
    np.testing.assert_array_equal(2 * x, got["x::gradient"])


def test_a_reshape_to_no_multiple_of_the_batch_is_refused_by_name() -> None:
    nodes = batch_of_x(
        node("Div", "six", "n", out="m"), node("Concat", "m", "rest", out="s", axis=0), node("Reshape", "x", "s")
    )
    with pytest.raises(ModelError, match=r"the_Reshape.*multiple of the batch"):
        differentiated_at_the_batch(nodes, normal(2, 6), {"six": ints(6), "rest": ints(-1)})


def test_a_slice_up_to_the_batch_is_refused_by_name() -> None:
    nodes = batch_of_x(node("Slice", "x", "zero", "n", "axis"))
    with pytest.raises(ModelError, match=r"the_Slice.*depends on the batch"):
        differentiated_at_the_batch(nodes, normal(2, 6), {"zero": ints(0), "axis": ints(1)})


def test_padding_by_the_batch_is_refused_by_name() -> None:
    nodes = batch_of_x(node("Concat", "none", "n", out="pads", axis=0), node("Pad", "x", "pads"))
    with pytest.raises(ModelError, match=r"the_Pad.*depends on the batch"):
        differentiated_at_the_batch(nodes, normal(2, 6), {"none": ints(0, 0, 0)})


def test_a_slice_of_nothing_is_refused_by_name() -> None:
    constants = {"b": ints(4), "e": ints(4), "a": ints(1)}
    with pytest.raises(ModelError, match=r"the_Slice.*nothing"):
        differentiated([node("Slice", "x", "b", "e", "a")], {"x": normal(2, 6)}, {"x": ("N", 6)}, constants)


def test_a_reshape_that_splits_channels_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Reshape"):
        differentiated(
            [node("Reshape", "x", "s")], {"x": normal(*SHAPE)}, {"x": ("N", "c", 4, 5)}, {"s": ints(0, 2, 3, 4, 5)}
        )


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Det"):
        differentiated([node("Det", "x")], {"x": normal(3, 2, 2)}, {"x": ("N", 2, 2)}, {})


def test_an_operator_has_one_rule() -> None:
    before = RULES["Relu"]
    with pytest.raises(ModelError, match=r"Relu has two gradient rules"):
        rule("Relu")(lambda tape, node: None)
    assert RULES["Relu"] is before


def test_a_constant_over_channels_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the_Mul"):
        differentiated([node("Mul", "x", "k")], {"x": normal(2, 6)}, {"x": ("N", "c")}, {"k": normal(6)})


@pytest.mark.parametrize("axis", [1, -1])
def test_concat_cuts_the_gradient_where_pieces_meet(axis: int) -> None:
    data = {"a": normal(2, 3, 4), "b": normal(2, 3 if axis == -1 else 5, 4, seed=1), "c": normal(2, 3, 4, seed=2)}
    shapes = {"a": ("N", "c1", 4), "b": ("N", "c1" if axis == -1 else "c2", 4), "c": ("N", "c1", 4)}
    check([node("Concat", "a", "b", "c", axis=axis)], lambda a, b, c: torch.cat([a, b, c], axis), data, shapes)
