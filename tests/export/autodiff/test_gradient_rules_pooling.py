"""Gradients of poolings against torch in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.oracles.differentiation import check, gradient_session, node, normal, reference

pytestmark = pytest.mark.torch

F = torch.nn.functional
few = settings(max_examples=40, deadline=None)

MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MEANS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.sampled_from((1, 2, 2, 3)))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel = each(1, 3)
    return {
        "size": each(3, 8 if rank < 3 else 5),
        "kernel": kernel,
        "strides": kernel if draw(st.booleans()) else each(1, 3),
        "pads": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "up": draw(st.booleans()),
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
        "ceil_mode": int(case["up"]),
    }


def shapes(case: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    return {"x": ("N", "c", *case["size"])}


# -- maxima ---------------------------------------------------------------------------------------------------------


@few
@given(case=pools())
def test_max_pool_gives_the_gradient_to_torchs_maximum(case: dict[str, Any]) -> None:
    pool = MAXIMA[len(case["size"])]
    oracle = lambda x: pool(x, case["kernel"], case["strides"], case["pads"], ceil_mode=case["up"])  # noqa: E731
    check([node("MaxPool", "x", **onnx_pool(case))], oracle, {"x": pool_input(case)}, shapes(case), narrow={"c": 2})


@pytest.mark.parametrize("constant", ["some", "all"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (2, 1)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_max_pool_on_flat_regions_is_bit_for_bit_torchs(rank: int, constant: str, kernel: int, stride: int) -> None:
    x = pool_input({"size": (8,) * rank, "constant": constant}, seed=3)
    oracle = lambda x: MAXIMA[rank](x, kernel, stride)  # noqa: E731
    check_bits([node("MaxPool", "x", kernel_shape=[kernel] * rank, strides=[stride] * rank)], oracle, x)


def check_bits(nodes: list[Any], oracle: Any, x: np.ndarray[Any, Any]) -> None:
    want_y = reference(oracle, {"x": x}, torch.float32, None)["result"]
    dy = np.round(normal(*want_y.shape, seed=9) * 8)  # whole numbers: sums are exact in any order
    want = reference(oracle, {"x": x}, torch.float32, dy)["x::gradient"]
    got = gradient_session(nodes, {"x": x}, {"x": ("N", "c", *x.shape[2:])}, {}).run({"x": x, "dy": dy})
    np.testing.assert_array_equal(want, got["x::gradient"])


def test_a_map_of_nan_leaves_the_gradients_of_other_maps_alone() -> None:
    x = normal(2, 3, 4, 4)
    x[0, 1], x[1, 2] = np.nan, np.nan  # the last one, too: what lies behind it is no memory of the gradient's
    pool = node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2])
    dy = normal(2, 3, 2, 2, seed=9)
    gradient = gradient_session([pool], {"x": x}, {"x": ("N", "c", 4, 4)}, {}).run({"x": x, "dy": dy})["x::gradient"]
    finite = np.isfinite(x).all(axis=(2, 3))
    want = reference(lambda x: F.max_pool2d(x, 2), {"x": np.nan_to_num(x)}, torch.float32, dy)["x::gradient"]
    np.testing.assert_array_equal(want[finite], gradient[finite])


def test_max_pool_with_dilation() -> None:
    oracle = lambda x: F.max_pool2d(x, 2, 1, 0, 2)  # noqa: E731
    pool = node("MaxPool", "x", kernel_shape=[2, 2], strides=[1, 1], dilations=[2, 2])
    check([pool], oracle, {"x": normal(2, 3, 6, 7)}, {"x": ("N", "c", 6, 7)})


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_max_pool_that_pads_by_itself(mode: str) -> None:
    before, after = {"SAME_UPPER": (0, 1), "SAME_LOWER": (1, 0), "VALID": (0, 0)}[mode]
    lowest = float("-inf")
    oracle = lambda x: F.max_pool2d(F.pad(x, (before, after) * 2, value=lowest), 3, 2)  # noqa: E731
    pool = node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad=mode)
    check([pool], oracle, {"x": normal(2, 3, 8, 6)}, {"x": ("N", "c", 8, 6)})


@pytest.mark.parametrize("constant", ["some", "all"])
@pytest.mark.parametrize("size", [(5,), (4, 3), (2, 3, 2)])
def test_maximum_of_a_whole_map(size: tuple[int, ...], constant: str) -> None:
    x = pool_input({"size": size, "constant": constant})
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(size)]
    check_bits([node("GlobalMaxPool", "x")], lambda x: pool(x, 1), x)


# -- means ----------------------------------------------------------------------------------------------------------


@few
@given(case=pools(), counted=st.booleans())
def test_average_pool(case: dict[str, Any], counted: bool) -> None:
    pool = MEANS[len(case["size"])]
    oracle = lambda x: pool(  # noqa: E731
        x, case["kernel"], case["strides"], case["pads"], ceil_mode=case["up"], count_include_pad=counted
    )
    mean = node("AveragePool", "x", **onnx_pool(case), count_include_pad=int(counted))
    check([mean], oracle, {"x": normal(3, 3, *case["size"])}, shapes(case), sums=True, narrow={"c": 2})
