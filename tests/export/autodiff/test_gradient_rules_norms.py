"""Gradients of softmax and of normalisations of single samples, at two widths of one graph, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.oracles.differentiation import check, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional
OFFSETS = [0.0, 100.0]
"""Means of the input: where it is large, sums of squares lose their digits."""


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_softmax_along_any_axis(op: str, axis: int) -> None:
    function = F.softmax if op == "Softmax" else F.log_softmax
    data, shapes = {"x": 4 * normal(3, 5, 6, 2)}, {"x": ("N", "c", 6, 2)}
    check([node(op, "x", axis=axis)], lambda x: function(x, axis), data, shapes, narrow={"c": 3})


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_of_large_numbers(op: str) -> None:
    function = F.softmax if op == "Softmax" else F.log_softmax
    x = np.array([[1000, 999, -1000], [-5000, 3, 2]], np.float32)
    check([node(op, "x")], lambda x: function(x, -1), {"x": x})


@pytest.mark.parametrize("axis", [-1, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", OFFSETS)
def test_layer_norm_over_channels_that_vary(axis: int, bias: bool, offset: float) -> None:
    dims: tuple[int | str, ...] = ("N", 4, 5, "c")
    own = dims[axis:]
    sizes = [9 if d == "c" else int(d) for d in own]
    data = {"x": normal(3, 4, 5, 9, offset=offset), "w": normal(*sizes, seed=1, offset=1.0)}
    shapes = {"x": dims, "w": own}
    if bias:
        data["b"], shapes["b"] = normal(*sizes, seed=2), own

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return F.layer_norm(x, w.shape, w, b, 1e-5)

    check([node("LayerNormalization", *data, axis=axis)], oracle, data, shapes, narrow={"c": 5})


@pytest.mark.parametrize("axis", [-1, 1])
def test_rms_norm_over_channels_that_vary(axis: int) -> None:
    own: tuple[int | str, ...] = ("c",) if axis == -1 else (5, "c")
    data = {"x": normal(3, 5, 8), "w": normal(*([8] if axis == -1 else [5, 8]), seed=1)}
    oracle = lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)  # noqa: E731
    nodes = [node("RMSNormalization", "x", "w", axis=axis, epsilon=1e-6)]
    check(nodes, oracle, data, {"x": ("N", 5, "c"), "w": own}, narrow={"c": 5})


@pytest.mark.parametrize("channels", ["g*3", "4*g", "12"])
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4)])
@pytest.mark.parametrize("offset", OFFSETS)
def test_group_norm_whose_groups_or_positions_are_cut(channels: str, spatial: tuple[int, ...], offset: float) -> None:
    """Whole groups are cut where a channel takes all of one, positions of all groups where it lies in each."""
    c: int | str = int(channels) if channels.isdigit() else channels
    data = {"x": normal(4, 12, *spatial, offset=offset), "w": normal(12, seed=1, offset=1.0), "b": normal(12, seed=2)}

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, x.shape[1] // 3 if channels == "g*3" else 4, w, b, 1e-5)

    shapes = {"x": ("N", c, *spatial), "w": (c,), "b": (c,)}
    nodes = [node("GroupNormalization", "x", "w", "b", num_groups=4)]
    check(nodes, oracle, data, shapes, narrow={"g": 2})


def test_group_norm_of_one_group_is_over_all_channels() -> None:
    data = {"x": normal(3, 7, 4), "w": normal(7, seed=1), "b": normal(7, seed=2)}
    shapes = {"x": ("N", "c", 4), "w": ("c",), "b": ("c",)}
    oracle = lambda x, w, b: F.group_norm(x, 1, w, b)  # noqa: E731
    check([node("GroupNormalization", "x", "w", "b", num_groups=1)], oracle, data, shapes, narrow={"c": 5})


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 1, 5, 4), (3, 4, 3, 3), (2, 5, 3, 4, 3)])
def test_instance_norm(shape: tuple[int, ...]) -> None:
    data = {"x": normal(*shape), "w": normal(shape[1], seed=1), "b": normal(shape[1], seed=2)}
    oracle = lambda x, w, b: F.instance_norm(x, weight=w, bias=b)  # noqa: E731
    check([node("InstanceNormalization", "x", "w", "b")], oracle, data)


@pytest.mark.parametrize("offset", OFFSETS)
def test_instance_norm_over_widths(offset: float) -> None:
    data = {"x": normal(3, 6, 4, 5, offset=offset), "w": normal(6, seed=1), "b": normal(6, seed=2)}
    shapes = {"x": ("N", "c", 4, 5), "w": ("c",), "b": ("c",)}
    oracle = lambda x, w, b: F.instance_norm(x, weight=w, bias=b)  # noqa: E731
    check([node("InstanceNormalization", "x", "w", "b")], oracle, data, shapes, narrow={"c": 2})


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [1, -1])
def test_lp_norm(p: int, axis: int) -> None:
    data, shapes = {"x": normal(3, 5, 6)}, {"x": ("N", "c", 6)}
    nodes = [node("LpNormalization", "x", p=p, axis=axis)]
    check(nodes, lambda x: F.normalize(x, p, axis), data, shapes, narrow={"c": 3})


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_local_response(size: int) -> None:
    data, shapes = {"x": 3 * normal(3, 7, 4, 5)}, {"x": ("N", "c", 4, 5)}
    nodes = [node("LRN", "x", size=size, alpha=0.5, beta=0.6, bias=1.5)]

    def oracle(x: torch.Tensor) -> torch.Tensor:
        squares = F.pad(x * x, (0, 0, 0, 0, (size - 1) // 2, size // 2))
        total = sum(squares[:, k : k + x.shape[1]] for k in range(size))
        return x / (1.5 + 0.5 / size * total) ** 0.6

    check(nodes, oracle, data, shapes, narrow={"c": 3})


@pytest.mark.parametrize("axes", [[0, 2, 3], [1, -1]])
def test_mean_and_variance(axes: list[int]) -> None:
    def oracle(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(axes, keepdim=True)) / x.std(axes, correction=0, keepdim=True)

    data, shapes = {"x": normal(4, 5, 3, 6, offset=10.0)}, {"x": ("N", "c", 3, 6)}
    check([node("MeanVarianceNormalization", "x", axes=axes)], oracle, data, shapes, narrow={"c": 3})


@pytest.mark.parametrize("spatial", [(), (4, 5)])
def test_batch_norm_with_frozen_statistics_normalises_by_them(spatial: tuple[int, ...]) -> None:
    data = {"x": normal(3, 6, *spatial, offset=2.0), "w": normal(6, seed=1), "b": normal(6, seed=2)}
    data |= {"m": normal(6, seed=3), "v": np.abs(normal(6, seed=4)) + np.float32(0.2)}
    shapes = dict.fromkeys("wbmv", ("c",)) | {"x": ("N", "c", *spatial)}
    nodes = [node("BatchNormalization", "x", "w", "b", "m", "v", epsilon=1e-3)]
    oracle = lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach(), w, b, eps=1e-3)  # noqa: E731
    check(nodes, oracle, data, shapes, frozen=("m", "v"), narrow={"c": 4})


def test_batch_norm_by_statistics_that_the_graph_computes() -> None:
    data = {"x": normal(3, 6, 4, offset=2.0)} | {n: normal(6, seed=i) for i, n in enumerate("wbmv", 1)}
    shapes = dict.fromkeys("wbmv", ("c",)) | {"x": ("N", "c", 4)}
    nodes = [
        node("Tanh", "m", out="mean"),
        node("Exp", "v", out="var"),
        node("BatchNormalization", "x", "w", "b", "mean", "var", epsilon=1e-3),
    ]

    def oracle(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        inverse = (v.exp() + 1e-3).rsqrt()
        return (x - m.tanh()[:, None]) * (inverse * w)[:, None] + b[:, None]

    check(nodes, oracle, data, shapes, narrow={"c": 4})
