"""Gradients where functions bend: at 0, ±1, ±100 and each function's bounds, exported from torch, against float64."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fedprune.model.features import Features
from fedprune_export.importing import export_torch, import_onnx
from support.oracles.cutting import outputs
from support.oracles.gradient_distance import Trained, torchs_gradients

pytestmark = pytest.mark.torch

F = torch.nn.functional
Function = Callable[[torch.Tensor], torch.Tensor]

COMMON = (0.0, 1.0, -1.0, 100.0, -100.0)
CLASSES = 5
TINY = float(np.finfo(np.float32).tiny)  # what float32 needn't tell from nothing

AT_BOUNDS: dict[str, tuple[Function, tuple[float, ...]]] = {
    "clamp": (lambda x: x.clamp(-1, 1), ()),
    "clamp_between_fractions": (lambda x: x.clamp(-0.5, 1.5), (-0.5, 1.5)),
    "clamp_below_min": (lambda x: x.clamp_min(0.5), (0.5,)),
    "clamp_above_max": (lambda x: x.clamp_max(-0.5), (-0.5,)),
    "clamp_of_equal_bounds": (lambda x: x + x.clamp(1.0, 1.0), ()),
    "clamp_wide": (lambda x: x.clamp(-3, 6), (-3.0, 6.0)),
    "clamp_min": (lambda x: x.clamp(min=0), ()),
    "clamp_max": (lambda x: x.clamp(max=1), ()),
    "clamp_min_fraction": (lambda x: x.clamp(min=0.5), (0.5,)),
    "clamp_max_fraction": (lambda x: x.clamp(max=-0.5), (-0.5,)),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), ()),
    "minimum": (lambda x: torch.minimum(x, x * x), ()),
    "relu": (F.relu, ()),
    "relu6": (F.relu6, (6.0,)),
    "hardtanh": (F.hardtanh, ()),
    "hardtanh_wide": (lambda x: F.hardtanh(x, -2, 3), (-2.0, 3.0)),
    "hardswish": (F.hardswish, (3.0, -3.0)),
    "hardsigmoid": (F.hardsigmoid, (3.0, -3.0)),
    "leaky_relu": (F.leaky_relu, ()),
    "elu": (F.elu, ()),
    "celu": (lambda x: F.celu(x, 0.7), ()),
    "selu": (F.selu, ()),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.1), (0.5,)),
    "softshrink": (F.softshrink, (0.5, -0.5)),
    "hardshrink": (F.hardshrink, (0.5, -0.5)),
    "where": (lambda x: torch.where(x > 0, x, x * 0.1), ()),
    "abs": (torch.abs, ()),
    "sign": (lambda x: x + torch.sign(x), ()),
    "floor": (lambda x: x - x.floor(), (0.5,)),
    "round": (lambda x: x - x.round(), (0.5, 1.5)),
    "remainder": (lambda x: torch.remainder(x, 0.5), (0.5, 0.75)),
    "fmod": (lambda x: torch.fmod(x, 0.5), (0.5, 0.75)),
}
"""Functions with bends, and the points besides the common ones where they have them."""

SMOOTH: dict[str, tuple[Function, tuple[float, ...]]] = {
    "gelu": (F.gelu, (20.0, -20.0)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (20.0, -20.0)),
    "silu": (F.silu, (20.0, -20.0)),
    "mish": (F.mish, (20.0, -20.0)),
    "softplus": (F.softplus, (20.0, -20.0)),
    "softplus_steep": (lambda x: F.softplus(x, beta=2), (10.0, -10.0)),
    "log_sigmoid": (F.logsigmoid, (20.0, -20.0)),
    "softsign": (F.softsign, ()),
    "tanh": (torch.tanh, ()),
    "tanhshrink": (F.tanhshrink, ()),
    "sigmoid": (torch.sigmoid, ()),
    "erf": (torch.erf, ()),
    "atan": (torch.atan, ()),
    "asinh": (torch.asinh, ()),
    "sin": (torch.sin, ()),
    "bell": (lambda x: torch.exp(-x * x), ()),
    "square": (lambda x: x**2, ()),
    "cube": (lambda x: x**3, ()),
    "power": (lambda x: x.abs() ** 1.5, ()),
    "root_of_relu": (lambda x: torch.sqrt(F.relu(x)), (4.0,)),
    "power_of_relu": (lambda x: F.relu(x) ** 0.4, (4.0,)),
    "power_of_relu6": (lambda x: F.relu6(x) ** 0.4, (4.0, 6.0)),
    "reciprocal_of_relu": (lambda x: torch.exp(-1 / F.relu(x)), (4.0,)),
    "root": (lambda x: torch.sqrt(x * x), (0.5,)),
    "reciprocal_root": (lambda x: torch.rsqrt(x * x + 1e-5), ()),
    "reciprocal": (lambda x: 1 / (x.abs() + 1), ()),
    "logarithm": (lambda x: torch.log1p(x.abs()), ()),
    "quotient": (lambda x: x / (1 + x * x), ()),
}

ROWS: dict[str, tuple[Function, tuple[float, ...]]] = {
    "std": (lambda x: x + x.std(-1, keepdim=True), ()),
    "std_of_equal_numbers": (lambda x: x + (x * 0).std(-1, keepdim=True), ()),
    "var_of_equal_numbers": (lambda x: x + (x * 0).var(-1, keepdim=True), ()),
    "norm": (lambda x: x + x.norm(dim=-1, keepdim=True), ()),
    "norm_of_nothing": (lambda x: x + (x * 0).norm(dim=-1, keepdim=True), ()),
    "normalize_nothing": (lambda x: x + F.normalize(x * 0, dim=-1), ()),
    "layer_norm_of_equal_numbers": (lambda x: x + F.layer_norm(x * 0, x.shape[-1:]), ()),
    "softmax": (lambda x: x.softmax(-1), ()),
    "log_softmax": (lambda x: x.log_softmax(-1), ()),
    "logsumexp": (lambda x: x + x.logsumexp(-1, keepdim=True), ()),
    "amax_of_equals": (lambda x: x + x.clamp(-1, 1).amax(-1, keepdim=True), ()),
    "amin_of_equals": (lambda x: x - x.clamp(-1, 1).amin(-1, keepdim=True), ()),
    "prod_with_a_zero": (lambda x: x + 0.01 * x.prod(-1, keepdim=True), ()),
    "prod_with_two_zeros": (lambda x: x + (x * x.relu()).prod(-1, keepdim=True), ()),
    "max_pool_of_equals": (lambda x: F.max_pool1d(x.clamp(-1, 1)[:, None], 3, 1, 1)[:, 0], ()),
}
"""Functions of whole rows of the common points."""

TABLE = AT_BOUNDS | SMOOTH | ROWS


class Points(nn.Module):
    """Every function of the table at its points, which are biases, so that they have gradients."""

    input_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.points, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, (function, points) in TABLE.items():
            values = torch.tensor([*COMMON, *points])
            layer, head = nn.Linear(3, len(values)), nn.Linear(len(values), CLASSES)
            with torch.no_grad():
                layer.weight.zero_()
                layer.bias.copy_(values)
                # The logits stay small, so that the softmax of the loss passes a gradient.
                head.weight /= 1 + function(values[None]).abs().max()
            self.points[name], self.heads[name] = layer, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.heads[n](TABLE[n][0](self.points[n](x))) for n in TABLE) / len(TABLE)  # type: ignore[return-value]


@cache
def gradients() -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and torch's in float64, of every parameter."""
    torch.manual_seed(0)
    net = Points().eval()
    model = import_onnx(export_torch(net), "points")
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    y = np.arange(4)
    trained, tensors = Trained(model), dict(model.tensors)
    exact = torchs_gradients(net, tensors, trained.names, x, y, torch.float64)
    return trained.gradients(tensors, x, y), exact


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.at_push(30)
def test_gradients_at_special_points_are_torchs(name: str) -> None:
    ours, exact = gradients()
    for tensor in (f"points.{name}.bias", f"points.{name}.weight", f"heads.{name}.weight"):
        got, want = ours[tensor], exact[tensor]
        finite = np.isfinite(want)
        assert finite.any()
        bound = 1e-5 * np.abs(want[finite]) + 1e-6 * np.abs(want[finite]).max() + TINY
        assert (np.abs(got[finite] - want[finite]) <= bound).all(), (tensor, got, want)


NEAR_0 = (0.0, 1e-10, -1e-10, 1e-7, -1e-7, 1e-4, -1e-4, 0.1, -0.1)
FAR = (1.0, -1.0, 5.0, -5.0, 20.0, -20.0, 60.0, -60.0)

EXACT: dict[str, tuple[Function, tuple[float, ...]]] = {
    "log1p": (torch.log1p, (*NEAR_0, -0.9, 1.0, 20.0, 1e6, 1e30)),
    "expm1": (torch.expm1, (*NEAR_0, 1.0, -1.0, 5.0, -5.0, 20.0, 60.0)),
    "softplus": (F.softplus, (*NEAR_0, *FAR, 1e30, -1e30)),
    "softplus_steep": (lambda x: F.softplus(x, beta=2, threshold=5), (*NEAR_0, *FAR[:6], 1e30, -1e30)),
    "log_sigmoid": (F.logsigmoid, (*NEAR_0, *FAR, 1e30, -1e30)),
    "logaddexp": (lambda x: torch.logaddexp(x, 1 - x), (*NEAR_0, 0.5, *FAR[:6], 500.0, -500.0, 1e30)),
    "logaddexp2": (lambda x: torch.logaddexp2(x, 1 - x), (*NEAR_0, 0.5, *FAR[:6], 500.0, -500.0, 1e30)),
    "logsumexp": (lambda x: torch.stack((x, -x, x / 2)).logsumexp(0), (*NEAR_0, *FAR, 1e30)),
}
"""Logarithms and exponentials, and the points at which simpler formulas round away or overflow."""


class Curve(nn.Module):
    """A function at its points."""

    input_shape = (1,)

    def __init__(self, function: Function, points: tuple[float, ...]) -> None:
        super().__init__()
        self.function, self.points = function, nn.Parameter(torch.tensor(points))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.points + 0 * x)


@pytest.mark.parametrize("name", EXACT)
def test_values_and_slopes_are_exact_near_0_and_far_away(name: str) -> None:
    net = Curve(*EXACT[name]).eval()
    model = import_onnx(export_torch(net), name)
    x, low = np.zeros((1, 1), np.float32), np.full((1, len(net.points)), -3e38, np.float32)
    trained = Trained(model, Features(loss="l1"), F.l1_loss)  # far above its labels the slope is the function's
    tensors = dict(model.tensors)
    exact = torchs_gradients(net, tensors, trained.names, x, low, torch.float64, F.l1_loss)
    value = net.double()(torch.zeros(1, 1)).detach().numpy()

    for got, want in (
        (outputs(model.graph, x), value),
        (trained.gradients(tensors, x, low)["points"], exact["points"]),
    ):
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=TINY)


def test_a_masked_direction_of_weight_norm_is_a_weight_of_nothing() -> None:
    """A mask may leave a row of v empty, whose weights torch computes as 0 / 0. It is treated as a row of length 1."""
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, CLASSES)).eval()
    net.input_shape = (3,)  # type: ignore[assignment]
    model = import_onnx(export_torch(net), "normed")
    g, v = (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    x, y = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), np.arange(4)
    masked = {n: np.array(a) for n, a in model.tensors.items()}
    masked[v][1] = 0
    alike = {n: np.array(a) for n, a in masked.items()}  # torch's other way to a row of weights that are 0
    alike[v][1], alike[g][1] = (1, 0, 0), 0
    trained = Trained(model)
    exact = torchs_gradients(net, alike, trained.names, x, y, torch.float64)

    got = trained.gradients(masked, x, y)

    for name in trained.names:
        rest = [0, 2, 3] if name in (v, g) else slice(None)
        np.testing.assert_allclose(got[name][rest], exact[name][rest], rtol=1e-4, atol=1e-7)
    assert got[g][1] == 0
    assert np.abs(got[v][1]).max() > 0  # the row can be learnt again
