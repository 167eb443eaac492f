"""Gradients of reductions, over channels as well, at two widths of one graph, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.oracles.differentiation import Oracle, check, differentiated, ints, node, normal

pytestmark = pytest.mark.torch


def product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for a in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(a, keepdim=keep)
    return x


REDUCTIONS: dict[str, Oracle] = {
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k),
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceMax": lambda x, a, k: x.amax(a, keepdim=k),
    "ReduceMin": lambda x, a, k: x.amin(a, keepdim=k),
    "ReduceProd": product,
    "ReduceL1": lambda x, a, k: x.abs().sum(a, keepdim=k),
    "ReduceL2": lambda x, a, k: torch.linalg.vector_norm(x, dim=a, keepdim=k),
    "ReduceSumSquare": lambda x, a, k: (x * x).sum(a, keepdim=k),
    "ReduceLogSumExp": lambda x, a, k: x.logsumexp(a, keepdim=k),
    "ReduceLogSum": lambda x, a, k: x.sum(a, keepdim=k).log(),
}
LINEAR = ("ReduceSum", "ReduceMean")


def check_reduction(op: str, shape: tuple[int | str, ...], axes: list[int], keep: bool) -> None:
    sizes = {"N": 3, "c": 4, "d": 3}
    x = normal(*(sizes.get(str(d), d) for d in shape), seed=len(axes))
    if op == "ReduceLogSum":
        x = np.abs(x) + np.float32(0.1)
    attrs: dict[str, Any] = {"keepdims": int(keep)}
    inputs, constants = ["x"], {}
    if op == "ReduceSum":
        inputs, constants = ["x", "a"], {"a": ints(*axes)}
    else:
        attrs["axes"] = axes
    oracle = lambda x: REDUCTIONS[op](x, axes, keep)  # noqa: E731
    narrow = {n: 2 for n in "cd" if n in shape}
    check([node(op, *inputs, **attrs)], oracle, {"x": x}, {"x": shape}, constants, sums=op in LINEAR, narrow=narrow)


@pytest.mark.parametrize("op", REDUCTIONS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_reductions(op: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.permutations(["N", "c", "d", 2])))
    axes = data.draw(st.lists(st.sampled_from([0, 1, 2, -1]), min_size=1, unique=True))
    check_reduction(op, shape, axes, data.draw(st.booleans()))


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_over_everything(op: str, keep: int) -> None:
    x = normal(3, 4)
    if op == "ReduceLogSum":
        x = np.abs(x) + np.float32(0.1)
    oracle = lambda x: REDUCTIONS[op](x, [0, 1], bool(keep))  # noqa: E731
    check([node(op, "x", keepdims=keep)], oracle, {"x": x}, {"x": ("N", "c")}, sums=op in LINEAR, narrow={"c": 2})


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_equals_share_the_gradient_of_an_extreme(op: str) -> None:
    x = np.array([[1, 3, 3, -2], [-2, -2, -2, -2]], np.float32)
    function = torch.amax if op == "ReduceMax" else torch.amin
    check([node(op, "x", axes=[1])], lambda x: function(x, 1, keepdim=True), {"x": x})


@pytest.mark.parametrize("zeros", [0, 1, 2])
def test_products_with_zeros(zeros: int) -> None:
    x = normal(3, 5)
    x[0, :zeros] = 0
    check([node("ReduceProd", "x", axes=[1])], lambda x: x.prod(1, keepdim=True), {"x": x})


def test_the_length_of_nothing_has_no_gradient() -> None:
    x = np.zeros((2, 3), np.float32)
    got = differentiated([node("ReduceL2", "x", axes=[1])], {"x": x}, {"x": ("N", 3)}, {})
    assert not got.run({"x": x, "dy": np.ones((2, 1), np.float32)})["x::gradient"].any()


def test_large_numbers_stay_finite_in_a_logarithm_of_exponentials() -> None:
    x = np.array([[900, 901, -900]], np.float32)
    check([node("ReduceLogSumExp", "x", axes=[1])], lambda x: x.logsumexp(1, keepdim=True), {"x": x})


def test_a_reduction_over_no_axes_is_none() -> None:
    nodes = [node("ReduceSum", "x", "a", noop_with_empty_axes=1, out="s"), node("Exp", "s")]
    check(nodes, lambda x: x.exp(), {"x": normal(3, 4)}, None, {"a": ints()})


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sums(exclusive: int, reverse: int) -> None:
    def oracle(x: torch.Tensor) -> torch.Tensor:
        y = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
        return y - x if exclusive else y

    nodes = [node("CumSum", "x", "a", exclusive=exclusive, reverse=reverse)]
    data, shapes = {"x": normal(3, 7, 4)}, {"x": ("N", 7, "c")}
    check(nodes, oracle, data, shapes, {"a": np.array(1, np.int64)}, sums=True, narrow={"c": 2})


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("keep", [0, 1])
def test_places_of_extremes_pick_data(op: str, keep: int) -> None:
    """The gradient passes through what was picked, not through its place."""
    nodes = [node(op, "x", axis=1, keepdims=keep, out="i")]
    nodes += [] if keep else [node("Unsqueeze", "i", "one", out="j")]
    nodes += [node("GatherElements", "x", "i" if keep else "j", axis=1)]
    function = torch.amax if op == "ArgMax" else torch.amin
    data, shapes = {"x": normal(3, 7, 4)}, {"x": ("N", 7, 4)}
    check(nodes, lambda x: function(x, 1, keepdim=True), data, shapes, {"one": ints(1)}, narrow={})


def test_global_average() -> None:
    check([node("GlobalAveragePool", "x")], lambda x: x.mean((2, 3), keepdim=True), {"x": normal(3, 4, 5, 6)})
