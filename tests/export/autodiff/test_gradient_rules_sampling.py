"""Gradients of samples at computed places against torch in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from support.oracles.differentiation import check, gradient_session, node, normal

pytestmark = pytest.mark.torch


def sample_grid(x: torch.Tensor, grid: torch.Tensor, **how: Any) -> torch.Tensor:
    return torch.nn.functional.grid_sample(x, grid, **how)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["bilinear", "bilinear", "nearest"]), padding=st.sampled_from(["zeros", "border"]),
    corners=st.booleans(), size=st.tuples(*[st.integers(1, 5)] * 4), spread=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_samples_of_maps_are_torchs(
    mode: str, padding: str, corners: bool, size: tuple[int, ...], spread: float, seed: int
) -> None:
    x, grid = normal(3, 4, *size[:2], seed=seed), np.float32(spread) * normal(3, *size[2:], 2, seed=seed + 1)
    check(
        [node("GridSample", "x", "grid", mode=mode, padding_mode=padding, align_corners=int(corners))],
        # The nearest place doesn't move with the grid: torch's gradient is 0.
        lambda x, grid: sample_grid(
            x, grid.detach() if mode == "nearest" else grid, mode=mode, padding_mode=padding, align_corners=corners
        ),
        {"x": x, "grid": grid},
        {"x": ("N", "c", *size[:2]), "grid": ("N", *size[2:], 2)},
        sums=True,
        narrow={"c": 2},
        frozen=["grid"] if mode == "nearest" else [],
    )


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_samples_at_places_and_borders_are_torchs(padding: str, corners: bool) -> None:
    """Where the gradient by the grid jumps, it is torch's."""
    ends = torch.tensor([-5.0, -1.5, -1.25, -1.0, -0.75, -0.5, 0.0, 0.5, 0.75, 1.0, 1.25, 99.0])
    grid = torch.stack(torch.meshgrid(ends, ends, indexing="xy"), dim=2)[None].numpy()
    attrs = {"mode": "bilinear", "padding_mode": padding, "align_corners": int(corners)}
    check(
        [node("GridSample", "x", "grid", **attrs)],
        lambda x, grid: sample_grid(x, grid, mode="bilinear", padding_mode=padding, align_corners=corners),
        {"x": normal(1, 3, 5, 4), "grid": grid},
        {"x": ("N", 3, 5, 4), "grid": ("N", *grid.shape[1:])},
        sums=True,
    )


@pytest.mark.parametrize(
    ("attrs", "size", "text"),
    [
        ({"mode": "bicubic"}, (4, 4), "the_GridSample.*mode: expected .*bilinear"),
        ({"padding_mode": "reflection"}, (4, 4), "the_GridSample.*padding: expected .*border"),
        ({}, (4, 4, 4), r"the_GridSample.*maps \[N, C, H, W\]"),
    ],
)
def test_other_samples_are_refused_by_name(attrs: dict[str, Any], size: tuple[int, ...], text: str) -> None:
    data = {"x": normal(2, 3, *size), "grid": normal(2, *size, len(size))}
    with pytest.raises(ModelError, match=text):
        gradient_session(
            [node("GridSample", "x", "grid", **attrs)], data, {n: ("N", *v.shape[1:]) for n, v in data.items()}, {}
        )
