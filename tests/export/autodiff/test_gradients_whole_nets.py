"""Gradients of whole networks at two widths of one graph, as near to torch in float64 as torch in float32 is.

The networks take their widths from their weights, so that torch runs the physically cut ones, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Features
from fedprune.model.selection import Selection
from fedprune.runtime.session import Session
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import seeded
from support.oracles.gradient_distance import CAP
from support.oracles.one_step import FLIPPED, Arrays, distances, feeds, oracle, parts, tensor_distances

pytestmark = pytest.mark.torch

F = torch.nn.functional
CLASSES, VOCABULARY = 5, 23

FLOOR = 1e-6
"""A relative distance that counts as none."""

SEEDS = 6
"""Two batches of each of three sizes: what is wrong at one size isn't taken for a flip."""


def normed(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias)


class Block(nn.Module):
    """Attention and a two-layer perceptron; either the number of heads or their size follows the weights."""

    def __init__(self, width: int, heads: int, size: int, *, cut: str, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.cut, self.causal = heads, size, cut, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("mask", torch.full((64, 64), -1e9).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        inner = self.qkv.weight.shape[0] // 3
        heads = inner // self.size if self.cut == "heads" else self.heads
        qkv = self.qkv(normed(x, self.norm1)).reshape(batch, tokens, 3, heads, inner // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * self.size**-0.5
        if self.causal:
            scores = scores + self.mask[:tokens, :tokens].to(x.dtype)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, inner)
        x = x + self.out(y)
        return x + self.fc2(F.gelu(self.fc1(normed(x, self.norm2))))


class Transformer(nn.Module):
    """A small vision transformer with a class token."""

    input_shape = (3, 12, 12)

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 24)), nn.Parameter(torch.randn(1, 10, 24))
        self.blocks = nn.Sequential(*[Block(24, 3, 8, cut=cut) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(normed(self.blocks(x), self.norm)[:, 0])


class Words(nn.Module):
    """Token and place embeddings, causal attention, the last word's logits."""

    input_shape = (7,)
    input_dtype = torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 16), nn.Parameter(torch.randn(1, 7, 16))
        self.block = Block(16, 2, 8, cut="heads", causal=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(normed(self.block(self.words(x) + self.places), self.norm)[:, -1])


class ConvNext(nn.Module):
    """A ConvNeXt block: depthwise 7×7, layer norm over channels last, GELU, a scale per channel."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.rand(8) + 0.5)
        self.fc1, self.fc2, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = F.conv2d(x, self.deep.weight, self.deep.bias, padding=3, groups=self.deep.weight.shape[0])
        y = normed(y.permute(0, 2, 3, 1), self.norm)
        y = self.fc2(F.gelu(self.fc1(y))) * self.scale
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.act(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MobileNet(nn.Module):
    """A MobileNetV3 block: inverted bottleneck with a depthwise convolution, squeeze and hard activations."""

    input_shape = (3, 10, 10)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze = Squeeze(16, F.hardsigmoid)
        self.thin, self.norm3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.norm0(self.stem(x)))
        y = F.hardswish(self.norm1(self.wide(x)))
        y = F.conv2d(y, self.deep.weight, None, 1, 1, groups=self.deep.weight.shape[0])
        y = self.squeeze(F.hardswish(self.norm2(y)))
        return self.head((x + self.norm3(self.thin(y))).mean((2, 3)))


class SqueezeNet(nn.Module):
    """Convolutions with squeeze and excitation, SiLU and group norm."""

    input_shape = (3, 10, 10)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
        self.norm, self.squeeze = nn.GroupNorm(4, 12), Squeeze(8, torch.sigmoid)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = F.silu(F.group_norm(x, x.shape[1] // 3, self.norm.weight, self.norm.bias))
        return self.head(self.squeeze(F.silu(self.conv2(x))).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "vit_by_heads": (lambda: Transformer("heads"), "coarse"),
    "vit_by_dims": (lambda: Transformer("dims"), "fine"),
    "words": (Words, "coarse"),
    "convnext": (ConvNext, "coarse"),
    "mobilenet": (MobileNet, "coarse"),
    "squeeze": (SqueezeNet, "coarse"),
}


@cache
def net_and_model(name: str) -> tuple[nn.Module, Model]:
    make, prefer = NETS[name]
    torch.manual_seed(3)
    net = seeded(make())
    return net.train(), import_onnx(export_torch(net), name, prefer=prefer)


def sample(name: str, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = (2 if name == "mobilenet" else 1, 3, 5)[seed % 3]  # its squeezed channels are one number a sample
    if name == "words":
        return rng.integers(0, VOCABULARY, (batch, *shape)), rng.integers(0, CLASSES, batch)
    return rng.standard_normal((batch, *shape)).astype(np.float32), rng.integers(0, CLASSES, batch)


@pytest.mark.slow
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", NETS)
def test_gradients_of_whole_networks(name: str, density: float) -> None:
    net, model = net_and_model(name)
    arch = model.architecture
    session = Session(training_graph(model, Features(gradients=True)).to_bytes(), training=True)
    weights = Selection.of(arch, widths_at(arch, density)).gather(model.tensors)
    ours: dict[str, list[float]] = {}
    torchs: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        x, y = sample(name, arch.input_shape, seed)
        exact, usual = (oracle(net, model, weights, x, y, t) for t in (torch.float64, torch.float32))
        got: Arrays = session.run(feeds(arch, weights, x, y))
        for found, result in ((ours, got), (torchs, usual)):
            errors = distances(result, exact, parts(arch)) | tensor_distances(result, exact, arch)
            for part, error in errors.items():
                found.setdefault(part, []).append(error)
    for part, errors in ours.items():
        assert np.median(errors) <= max(FLOOR, 2 * np.median(torchs[part])), part
    for part in parts(arch):
        # A sign that flips next to zero is no error; where none did, no batch is off.
        calm = [[e for e in found[part] if e < FLIPPED] for found in (ours, torchs)]
        assert len(calm[0]) >= len(calm[1]) - 1
        assert max(calm[0]) <= max(FLOOR, 2 * max(calm[1])), part
        assert max(ours[part]) <= CAP, part


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_channel_of_a_whole_network_is_cut(name: str) -> None:
    """Each network varies in all widths that its torch form follows: a test at one width would show nothing."""
    _, model = net_and_model(name)
    cut = {t.name for t in model.architecture.tensors if any(a.groups for a in t.axes)}
    expected = {"vit_by_heads": "blocks.0.qkv.weight", "vit_by_dims": "blocks.1.qkv.weight", "words": "words.weight"}
    expected |= {"convnext": "deep.weight", "mobilenet": "squeeze.fc1.weight", "squeeze": "norm.weight"}
    assert expected[name] in cut
