"""Gradients of resizing, of space and depth, and of the norm over neighbouring channels, against torch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from support.oracles.differentiation import check, differentiated, ints, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nearest": (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "nearest"},
    ),
    "half_pixel": (
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        {"mode": "linear", "align_corners": False},
    ),
    "align_corners": (
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "linear", "align_corners": True},
    ),
    "cubic": (
        {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
        {"mode": "bicubic", "align_corners": False},
    ),
    "cubic_corners": (
        {"mode": "cubic", "coordinate_transformation_mode": "align_corners", "cubic_coeff_a": -0.75},
        {"mode": "bicubic", "align_corners": True},
    ),
}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_resizing_to_a_size(kind: str, data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from([2] if "cubic" in kind else [1, 2, 2, 3] if kind == "nearest" else [2, 2, 3]))
    before = tuple(data.draw(st.integers(1, 6)) for _ in range(rank))
    after = tuple(data.draw(st.integers(1, 9)) for _ in range(rank))
    attrs, how = KINDS[kind]
    how = {**how, "mode": LINEAR[rank]} if how["mode"] == "linear" else how
    oracle = lambda x: F.interpolate(x, after, **how)  # noqa: E731
    sizes = {"sizes": np.array([3, 4, *after], np.int64)}
    # The batch of the traced graph isn't three: sizes of the batch and of channels come from the input.
    resized = node("Resize", "x", "", "", "sizes", **attrs)
    x = normal(3, 4, *before)
    shapes: dict[str, tuple[int | str, ...]] = {"x": (3, 4, *before)}
    check([resized], oracle, {"x": x}, shapes, sizes, sums="cubic" not in kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "times"), [((4, 5), (2.0, 2.0)), ((3, 4), (2.0, 3.0)), ((6, 4), (0.5, 1.5))])
def test_resizing_by_a_scale_with_any_width_and_batch(
    kind: str, before: tuple[int, int], times: tuple[float, float]
) -> None:
    attrs, how = KINDS[kind]
    how = {**how, "mode": "bilinear"} if how["mode"] == "linear" else how
    after = tuple(int(b * t) for b, t in zip(before, times, strict=True))
    oracle = lambda x: F.interpolate(x, after, **how)  # noqa: E731
    scales = {"scales": np.array([1, 1, *times], np.float32)}
    x = {"x": normal(3, 4, *before)}
    check(
        [node("Resize", "x", "", "scales", **attrs)],
        oracle,
        x,
        {"x": ("N", "c", *before)},
        scales,
        sums="cubic" not in kind,
        narrow={"c": 2},
    )


def test_resizing_of_channels_or_a_region_is_refused_by_name() -> None:
    x, dims = {"x": normal(2, 4, 3, 3)}, {"x": ("N", "c", 3, 3)}
    scales = {"scales": np.array([1, 2, 1, 1], np.float32)}
    with pytest.raises(ModelError, match="the_Resize"):
        differentiated([node("Resize", "x", "", "scales", mode="nearest")], x, dims, scales)
    crop = node("Resize", "x", "roi", "", "sizes", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")
    regions = {"roi": np.array([0, 0, 0, 0, 1, 1, 0.5, 1], np.float32), "sizes": ints(2, 4, 3, 3)}
    with pytest.raises(ModelError, match="the_Resize"):
        differentiated([crop], x, {"x": (2, 4, 3, 3)}, regions)


# -- space and depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_channels_to_places_in_torchs_order(size: int) -> None:
    x = {"x": normal(3, 2 * size * size, 2, 3)}
    shuffle = node("DepthToSpace", "x", blocksize=size, mode="CRD")
    dims: dict[str, tuple[int | str, ...]] = {"x": ("N", f"c*{size * size}", 2, 3)}
    check([shuffle], lambda x: F.pixel_shuffle(x, size), x, dims, narrow={"c": 1})


def test_channels_to_places_in_the_other_order() -> None:
    def oracle(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        apart = x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return apart.reshape(n, c // 4, 2 * h, 2 * w)

    x = {"x": normal(3, 12, 2, 3)}
    check([node("DepthToSpace", "x", blocksize=2)], oracle, x, {"x": ("N", "4*c", 2, 3)}, narrow={"c": 2})


def test_places_to_channels() -> None:
    def oracle(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)

    x = {"x": normal(3, 5, 4, 6)}
    check([node("SpaceToDepth", "x", blocksize=2)], oracle, x, {"x": ("N", "c", 4, 6)}, narrow={"c": 2})


def test_blocks_of_channels_that_are_cut_unevenly_are_refused_by_name() -> None:
    x = {"x": normal(3, 12, 2, 3)}
    with pytest.raises(ModelError, match="the_DepthToSpace"):
        differentiated([node("DepthToSpace", "x", blocksize=2)], x, {"x": ("N", "c", 2, 3)}, {})


# -- local response norm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5])  # onnxruntime has no even ones
def test_norm_over_neighbouring_channels(size: int) -> None:
    oracle = lambda x: F.local_response_norm(x, size, 0.5, 0.6, 1.5)  # noqa: E731
    norm = node("LRN", "x", size=size, alpha=0.5, beta=0.6, bias=1.5)
    check([norm], oracle, {"x": normal(3, 6, 3, 2)}, {"x": ("N", 6, 3, 2)})
