"""A narrowed torch module computes what the cut graph computes, and says what it can't be cut to."""

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.model.selection import Selection
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.importing.torch_narrowing import narrowed
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from support.nets import small_nets as nets
from support.oracles.cutting import distance, inputs, outputs, random_selection

pytestmark = pytest.mark.torch


class Mixed(nn.Module):
    """Depthwise and transposed convolutions, norms of every kind, a shortcut and PReLU."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise, self.group = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.GroupNorm(1, 12)
        self.point, self.prelu = nn.Conv2d(12, 12, 1), nn.PReLU(12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.hidden, self.norm, self.head = nn.Linear(8, 20), nn.LayerNorm(20), nn.Linear(20, 5)
        self.register_buffer("shift", torch.full((3, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x - self.shift)))
        x = x + self.prelu(self.point(self.group(self.depthwise(x))))
        x = self.norm(self.hidden(self.up(x).mean((2, 3))))
        return self.head(torch.relu(x))


class Grouped(nn.Module):
    """A convolution in groups that is not depthwise."""

    input_shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(torch.relu(self.one(x))).mean((2, 3)))


def import_module(module: nn.Module) -> Model:
    return import_onnx(export_torch(module), "net")


@pytest.mark.parametrize("make", [nets.lenet, pytest.param(nets.resnet20_bn, marks=pytest.mark.soak), nets.concat_net,
                                  lambda: nets.randomise_norms(Mixed())],
                         ids=["lenet", "resnet20", "concat", "mixed"])  # fmt: skip
def test_it_computes_what_the_cut_graph_computes(make) -> None:  # type: ignore[no-untyped-def]
    model = import_module(make())
    for seed, density in enumerate((0.6, 0.25)):
        selection = random_selection(model, density, seed)
        module = narrowed(make(), selection.gather(model.tensors)).eval()
        x = inputs(model, 3)
        with torch.no_grad():
            got = module(torch.from_numpy(x)).numpy()
        assert distance(got, outputs(cut(model, selection), x)) < 1e-5
        sent = {n: tuple(v.shape) for n, v in module.state_dict().items()}
        assert {n: sent[n] for n in selection.shapes()} == selection.shapes()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)
            if isinstance(layer, nn.Linear):
                assert layer.weight.shape == (layer.out_features, layer.in_features)


def test_what_cant_be_narrowed_is_named_and_untouched() -> None:
    model = import_module(Grouped())
    full = Selection.full(model.architecture)
    narrow = full.with_widths([max(1, n // 2) for n in full.widths])
    module = Grouped()
    with pytest.raises(ModelError, match="two: a Conv2d like this"):
        narrowed(module, narrow.gather(model.tensors))
    assert module.one.weight.shape[0] == 8
    narrowed(module, full.gather(model.tensors))
    tensors = full.gather(model.tensors)
    with pytest.raises(ModelError, match=r"one\.weight"):
        narrowed(Grouped(), {**tensors, "one.weight": np.zeros((9, 3, 1, 1), np.float32)})
    with pytest.raises(ModelError, match=r"no tensor 'other'"):
        narrowed(Grouped(), {**tensors, "other": np.zeros(3, np.float32)})
    with pytest.raises(ModelError, match=r"head\.bias"):
        narrowed(Grouped(), {n: v for n, v in tensors.items() if n != "head.bias"})


def test_parameters_keep_what_they_were() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).double()
    module[1].bias.requires_grad_(False)
    small = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)}
    narrowed(module, {n: np.ones(s, np.float32) for n, s in small.items()})
    assert module[0].weight.dtype == torch.float64
    assert [p.requires_grad for p in module.parameters()] == [True, True, True, False]
    module(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert module[0].weight.grad is not None
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    narrowed(tied, {n: np.ones(s, np.float32) for n, s in (("0.weight", (4, 4)), ("0.bias", (4,)), ("1.bias", (4,)))})
    assert tied[1].weight is tied[0].weight


class Standardised(nn.Conv2d):
    """A convolution that computes with other weights than its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize("override", ["class", "instance"])
def test_a_layer_that_computes_in_a_way_of_its_own_is_refused(override: str) -> None:
    conv = Standardised(3, 8, 3) if override == "class" else nn.Conv2d(3, 8, 3)
    if override == "instance":
        conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2  # type: ignore[method-assign]
    module = nn.Sequential(conv, nn.Conv2d(8, 4, 1))
    tensors = {n: v.numpy() for n, v in nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)).state_dict().items()}
    with pytest.raises(ModelError, match="0"):
        narrowed(module, tensors)
    assert module[0].weight.shape == (8, 3, 3, 3)
