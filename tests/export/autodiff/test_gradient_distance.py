"""The measures that gradients of whole networks are tested by: what they take for rounding, for a flip, for wrong."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedprune_export.importing import export_torch, import_onnx
from support.oracles.gradient_distance import TENSOR, Distances, Trained

pytestmark = pytest.mark.torch

EXACT, FLIP, WRONG = 2e-7, 1e-4, 0.9
SIZES = (1, 3, 5) * 3


def measured(ours: list[float], torchs: list[float]) -> Distances:
    """Distances of a network of one tensor."""
    return Distances(ours, torchs, {"w": ours}, {"w": torchs}, list(SIZES))


def test_rounding_and_flips_of_either_engine_are_near() -> None:
    assert measured([EXACT] * 9, [EXACT] * 9).near
    assert measured([FLIP, *[EXACT] * 7, FLIP], [EXACT] * 9).near
    assert measured([EXACT] * 9, [FLIP] * 3 + [EXACT] * 6).near


@pytest.mark.parametrize("far", [WRONG, math.nan, math.inf])
@pytest.mark.parametrize("batches", [{0}, {8}, {0, 1}, {2, 5, 8}, set(range(9))])
def test_what_is_far_in_some_batches_is_not_near(batches: set[int], far: float) -> None:
    ours = [far if i in batches else EXACT for i in range(9)]
    assert not measured(ours, [EXACT] * 9).near


@pytest.mark.parametrize("size", [1, 3, 5])
def test_what_is_off_at_one_size_is_no_flip(size: int) -> None:
    ours = [FLIP if n == size else EXACT for n in SIZES]
    assert not measured(ours, [EXACT] * 9).near
    assert not measured(ours, [FLIP if n != size else EXACT for n in SIZES]).near


def test_what_torch_gives_no_number_for_is_not_near() -> None:
    assert not measured([EXACT] * 9, [math.nan, *[EXACT] * 8]).near


def test_a_tensor_that_is_wrong_or_no_number_is_the_worst() -> None:
    calm = [EXACT] * 9
    for far in (1e-4, math.nan):
        found = Distances(calm, calm, {"v": calm, "w": [far] * 9}, {"v": calm, "w": calm}, list(SIZES))
        assert found.worst == "w"
        assert found.excess("w") > TENSOR > found.excess("v")


class Net(nn.Module):
    """Two convolutions, of which the second has a bias that its norm takes away again."""

    input_shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.head = nn.InstanceNorm2d(4, affine=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(self.norm(self.conv2(torch.sigmoid(self.conv1(x))))).mean((2, 3)))


class Recurrent(nn.Module):
    """A recurrent layer and a head at its last step."""

    input_shape = (6, 4)

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


def batches(shape: tuple[int, ...]) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((n, *shape)).astype(np.float32), rng.integers(0, 3, n)) for n in SIZES]


def test_frozen_tensors_have_no_gradients_and_those_that_cancel_are_measured_by_the_others() -> None:
    torch.manual_seed(0)
    net = Net()
    net.conv1.weight.requires_grad_(False)
    model = import_onnx(export_torch(net), "net")
    found = Trained(model).distances(net, model.tensors, batches(net.input_shape))
    assert set(found.ours_each) == {n for n, _ in net.named_parameters()} - {"conv1.weight"}
    assert found.near
    assert max(found.ours_each["conv2.bias"]) < 1e-6
    assert found.excess(found.worst) <= TENSOR


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_as_torch_wrote_them_once(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    net, raw = Recurrent(kind), io.BytesIO()
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "N"}}}
    with pytest.warns():
        torch.onnx.export(net, (torch.zeros(2, *net.input_shape),), raw, dynamo=False, opset_version=17, **names)
    model = import_onnx(raw.getvalue(), "net")
    found = Trained(model).distances(model.graph, model.tensors, batches(net.input_shape))
    assert found.near
    assert found.excess(found.worst) <= TENSOR
