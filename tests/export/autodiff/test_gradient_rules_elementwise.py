"""Gradients of functions of single numbers and of several values against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.oracles.differentiation import Oracle, check, differentiated, floats, ints, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional

SMOOTH: dict[str, tuple[dict[str, Any], Oracle]] = {
    "Elu": ({"alpha": 0.7}, lambda x: F.elu(x, 0.7)),
    "Selu": ({}, F.selu),
    "Celu": ({"alpha": 1.6}, lambda x: F.celu(x, 1.6)),
    "Gelu": ({}, F.gelu),
    "Mish": ({}, F.mish),
    "Softplus": ({}, F.softplus),
    "Softsign": ({}, F.softsign),
    "Erf": ({}, torch.erf),
    "Exp": ({}, torch.exp),
    "Sin": ({}, torch.sin),
    "Cos": ({}, torch.cos),
    "Tan": ({}, lambda x: torch.tan(x / 9)),
    "Atan": ({}, torch.atan),
    "Sinh": ({}, torch.sinh),
    "Cosh": ({}, torch.cosh),
    "Asinh": ({}, torch.asinh),
    "Abs": ({}, torch.abs),
    "ThresholdedRelu": ({"alpha": 0.6}, lambda x: F.threshold(x, 0.6, 0.0)),
    "Shrink": ({"lambd": 0.7, "bias": 0.7}, lambda x: F.softshrink(x, 0.7)),
    "Reciprocal": ({}, lambda x: 1 / x),
}
POSITIVE: dict[str, Oracle] = {
    "Acosh": lambda x: torch.acosh(1 + x),
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
}
WITHIN: dict[str, Oracle] = {"Asin": torch.asin, "Acos": torch.acos, "Atanh": torch.atanh}


@pytest.mark.parametrize("op", SMOOTH)
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 8, 8)])
def test_functions(op: str, shape: tuple[int, ...]) -> None:
    attrs, oracle = SMOOTH[op]
    x = 3 * normal(*shape)
    nodes = [node(op, "x", **attrs)]
    constants = {}
    if op == "Tan":
        nodes, constants = [node("Div", "x", "nine", out="s"), node("Tan", "s")], {"nine": floats(9.0)}
    if op == "Reciprocal":
        x = x + np.sign(x)
    check(nodes, lambda x: oracle(x), {"x": x}, {"x": ("N", "c", *shape[2:])}, constants, narrow={"c": 2})


@pytest.mark.parametrize("op", POSITIVE)
def test_functions_of_positive_numbers(op: str) -> None:
    nodes = [node("Add", "x", "one", out="s"), node(op, "s")] if op == "Acosh" else [node(op, "x")]
    x = np.abs(normal(4, 30)) + np.float32(0.1)
    check(nodes, lambda x: POSITIVE[op](x), {"x": x}, None, {"one": floats(1)})


@pytest.mark.parametrize("op", WITHIN)
def test_functions_between_minus_one_and_one(op: str) -> None:
    check([node(op, "x")], lambda x: WITHIN[op](x), {"x": (0.9 * np.tanh(normal(4, 30))).astype(np.float32)})


def test_gelu_by_tanh() -> None:
    x = 4 * normal(8, 50)
    check([node("Gelu", "x", approximate="tanh")], lambda x: F.gelu(x, approximate="tanh"), {"x": x})


@pytest.mark.parametrize("op", ["Elu", "Selu", "Celu", "Softplus", "Mish", "Gelu", "ThresholdedRelu"])
def test_functions_stay_finite_far_from_zero(op: str) -> None:
    x = np.array([[-200, -90, -30, 30, 90, 200]], np.float32)
    got = differentiated([node(op, "x")], {"x": x}, {"x": ("N", 6)}, {}).run({"x": x, "dy": np.ones_like(x)})
    assert all(np.isfinite(v).all() for v in got.values())
    np.testing.assert_allclose(got["x::gradient"][0, 3:], got["x::gradient"][0, 5], rtol=1e-6)


@pytest.mark.parametrize("op", ["Elu", "Selu", "Celu", "Abs", "Softsign"])
def test_gradient_at_exactly_zero_is_torchs(op: str) -> None:
    attrs, oracle = SMOOTH[op]
    check([node(op, "x", **attrs)], lambda x: oracle(x), {"x": np.array([[-1, 0, 2], [0, 0, -3]], np.float32)})


@pytest.mark.parametrize("slope", [(1,), (5, 1, 1), (5, 3, 3), ()])
def test_prelu(slope: tuple[int, ...]) -> None:
    data = {"x": normal(3, 5, 3, 3), "a": normal(*slope, seed=1)}
    data["x"][0, 0] = 0
    shapes = {"x": ("N", "c", 3, 3), "a": tuple("c" if d == 5 else d for d in slope)}
    check([node("PRelu", "x", "a")], lambda x, a: torch.where(x > 0, x, a * x), data, shapes, narrow={"c": 2})


@pytest.mark.parametrize("op", ["Floor", "Ceil", "Round", "Sign"])
def test_steps_pass_no_gradient(op: str) -> None:
    nodes = [node(op, "x", out="s"), node("Add", "s", "x")]
    check(nodes, lambda x: getattr(torch, op.lower())(x).detach() + x, {"x": 3 * normal(4, 5)})


def test_casts_between_floats_pass_gradients() -> None:
    nodes = [node("Cast", "x", out="d", to=11), node("Mul", "d", "k", out="m"), node("Cast", "m", to=1)]
    check(nodes, lambda x: x * 0.3, {"x": normal(4, 5)}, None, {"k": np.array(0.3)})


def test_a_truth_cast_to_a_number_passes_no_gradient() -> None:
    nodes = [node("Greater", "x", "k", out="t"), node("Cast", "t", out="f", to=1), node("Mul", "f", "x")]
    check(nodes, lambda x: (x > 0.2).to(x.dtype) * x, {"x": normal(4, 5)}, None, {"k": floats(0.2)})


# -- several values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_extremes_share_the_gradient_of_equals(op: str) -> None:
    function = torch.maximum if op == "Max" else torch.minimum
    data = {"a": normal(3, 4), "b": normal(1, 4, seed=1), "c": normal(3, 1, seed=2)}
    data["a"][0] = data["b"][0]
    oracle = lambda a, b, c: function(function(a, b), c)  # noqa: E731
    check([node(op, "a", "b", "c")], oracle, data)


@pytest.mark.parametrize("inputs", [("x", "bound"), ("bound", "x")])
@pytest.mark.parametrize(("op", "side"), [("Max", "min"), ("Min", "max")])
def test_an_extreme_beside_one_number_is_torchs_clamp(op: str, side: str, inputs: tuple[str, str]) -> None:
    x = np.array([[0.5, 0.25, 0.5], [-3.0, 0.5, 4.0]], np.float32)
    check([node(op, *inputs)], lambda x: x.clamp(**{side: 0.5}), {"x": x}, None, {"bound": floats(0.5)})


@pytest.mark.parametrize("op", ["Sum", "Mean"])
def test_sums_of_several_values(op: str) -> None:
    data = {"a": normal(3, 4), "b": normal(1, 4, seed=1), "c": normal(4, seed=2)}
    share = 1 if op == "Sum" else 3
    check([node(op, *data)], lambda a, b, c: (a + b + c) / share, data, sums=True)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0, 0.0, 1.0, 1.7])
def test_powers_with_constant_exponents(exponent: float) -> None:
    x = normal(4, 20)
    if exponent != int(exponent) or exponent < 0:
        x = np.abs(x) + np.float32(0.1)
    elif exponent >= 1:
        x[0, 0] = 0
    check([node("Pow", "x", "p")], lambda x: x**exponent, {"x": x}, None, {"p": floats(exponent)})


def test_powers_with_whole_exponents() -> None:
    check([node("Pow", "x", "p")], lambda x: x**3, {"x": normal(4, 5)}, None, {"p": np.array(3, np.int64)})


def test_powers_with_trained_exponents() -> None:
    data = {"a": np.abs(normal(4, 5)) + np.float32(0.1), "b": normal(5, seed=1)}
    check([node("Pow", "a", "b")], lambda a, b: a**b, data)


def test_remainder() -> None:
    x = 5 * normal(4, 5)
    check([node("Mod", "x", "m", fmod=1)], lambda x: torch.fmod(x, 1.5), {"x": x}, None, {"m": floats(1.5)})


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_where_broadcasts(data: st.DataObject) -> None:
    full = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shapes = [tuple(d if data.draw(st.booleans()) else 1 for d in full) for _ in range(3)]
    taken = normal(*shapes[0], seed=5) > 0
    arrays = {"a": normal(*shapes[1], seed=1), "b": normal(*shapes[2], seed=2)}
    oracle = lambda a, b: torch.where(torch.tensor(taken), a, b)  # noqa: E731
    check([node("Where", "t", "a", "b")], oracle, arrays, None, {"t": taken}, sums=True)


@pytest.mark.parametrize("op", ["Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
def test_comparisons_of_data_choose(op: str) -> None:
    compare = {"Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le}[op]
    nodes = [node(op, "a", "b", out="t"), node("Where", "t", "a", "b")]
    data = {"a": normal(4, 5), "b": normal(4, 5, seed=1)}
    check(nodes, lambda a, b: torch.where(compare(a, b), a, b), data)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic_of_data_chooses(op: str) -> None:
    logic = {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}[op]
    nodes = [
        node("Greater", "x", "zero", out="p"),
        node("Less", "x", "one", out="q"),
        node(op, "p", "q", out="both"),
        node("Not", "both", out="t"),
        node("Where", "t", "x", "zero"),
    ]
    oracle = lambda x: torch.where(~logic(x > 0, x < 1), x, 0)  # noqa: E731
    check(nodes, oracle, {"x": 2 * normal(4, 9)}, None, {"zero": floats(0), "one": floats(1)})


def test_a_constant_over_channels_with_equal_entries_is_as_long_as_they_are() -> None:
    data, shapes = {"x": normal(3, 6, 2)}, {"x": ("N", "c", 2)}
    constants = {"k": np.full((6, 1), 0.5, np.float32)}
    check([node("Mul", "x", "k")], lambda x: x * 0.5, data, shapes, constants, values={"k": ("c", 1)}, narrow={"c": 4})


def test_numbers_of_shapes_that_data_is_computed_with() -> None:
    nodes = [
        node("Shape", "x", out="s"),
        node("Gather", "s", "one", out="n"),
        node("Cast", "n", out="f", to=1),
        node("Sqrt", "f", out="r"),
        node("Div", "x", "r"),
    ]
    data, shapes = {"x": normal(3, 6)}, {"x": ("N", "c")}
    check(nodes, lambda x: x / x.shape[1] ** 0.5, data, shapes, {"one": ints(1)}, narrow={"c": 4})
