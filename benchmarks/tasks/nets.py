"""Networks of the tasks, as a user of torch would write them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedprune_export.importing.sources import torch_module


def mel_matrix(bands: int, bins: int, rate: int) -> np.ndarray[Any, Any]:
    """Triangles that are equally wide on the mel scale (O'Shaughnessy 1987) [bands, bins]."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1) / (rate / 2) * (bins - 1)
    at = np.arange(bins)
    low, middle, high = (edges[i : i + bands, None] for i in range(3))
    rising, falling = (at - low) / (middle - low), (high - at) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling))


class Crnn(nn.Module):
    """Raw audio at 8 kHz to digits: spectrum as a convolution, mel bands, two convolutions, a GRU."""

    input_shape = (6000,)
    window, hop, bands = 200, 80, 24

    def __init__(self) -> None:
        super().__init__()
        bins = self.window // 2 + 1
        angle = 2 * np.pi * np.arange(bins)[:, None] * np.arange(self.window) / self.window
        waves = np.concatenate([np.cos(angle), np.sin(angle)]) * np.hanning(self.window)
        self.register_buffer("waves", torch.tensor(waves[:, None], dtype=torch.float32))
        self.register_buffer("mel", torch.tensor(mel_matrix(self.bands, bins, 8000), dtype=torch.float32))
        self.one = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.two = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.rnn = nn.GRU(32 * (self.bands // 4), 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        waves = functional.conv1d(x.unsqueeze(1), self.waves, stride=self.hop)
        re, im = waves.chunk(2, 1)
        bands = torch.log(torch.matmul(self.mel, re * re + im * im) + 1e-4)
        maps = self.two(self.one(bands.unsqueeze(1)))
        steps = maps.flatten(1, 2).permute(2, 0, 1)
        return self.head(self.rnn(steps)[0].mean(0))


class UNet(nn.Module):
    """MobileNetV2 at half width (timm) as encoder, four steps up."""

    input_shape = (3, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        whole = torch_module("timm:mobilenetv2_050")
        self.stem = nn.Sequential(whole.conv_stem, whole.bn1)
        self.encoder = nn.ModuleList([whole.blocks[0], whole.blocks[1], whole.blocks[2], whole.blocks[3:5]])
        below, *beside = 48, 16, 16, 8
        self.up = nn.ModuleList()
        for more, out in zip([*beside, 0], (48, 32, 24, 16), strict=True):
            self.up.append(nn.Sequential(
                nn.Conv2d(below + more, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            ))  # fmt: skip
            below = out
        self.head = nn.Conv2d(16, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, found = self.stem(x), []
        for stage in self.encoder:
            value = stage(value)
            found.append(value)
        *beside, value = found
        for layer, more in zip(self.up, [*beside[::-1], None], strict=True):
            value = functional.interpolate(value, scale_factor=2.0)
            value = layer(value if more is None else torch.cat([value, more], 1))
        return self.head(value)


class Detector(nn.Module):
    """A grid of 8 × 8 cells over a canvas of 64 × 64: whether an object's centre is there, its box, its class."""

    input_shape = (1, 64, 64)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for after, stride in ((16, 2), (32, 2), (64, 2), (64, 1), (64, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(64, 15, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Block(nn.Module):
    """A block of a transformer, with the norm first."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        split = self.qkv(self.before(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = split[0], split[1], split[2]
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(seen.permute(0, 2, 1, 3).reshape(n, length, width))
        return x + self.mlp(self.after(x))


class OfSeries(nn.Module):
    """A block of a transformer over the tokens of each series by itself [n, series, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(3, (self.heads, -1)).transpose(2, 3) for f in (self.q, self.k, self.v))
        score = torch.matmul(q, k.transpose(3, 4)) / math.sqrt(q.shape[4])
        x = x + self.out(torch.matmul(score.softmax(4), v).transpose(2, 3).flatten(3))
        return x + self.mlp(self.after(x))


class Patches(nn.Module):
    """A transformer over patches of 16 hours of each series by itself, normalised by the window (Nie et al., "A time
    series is worth 64 words", ICLR 2023, without dropout)."""

    length, horizon, patch, stride, width = 336, 96, 16, 8, 32
    input_shape = (7, 336)

    def __init__(self) -> None:
        super().__init__()
        starts = torch.arange(0, self.length - self.patch + 1, self.stride)
        self.register_buffer("places", starts[:, None] + torch.arange(self.patch))
        self.embed = nn.Linear(self.patch, self.width)
        self.place = nn.Parameter(0.02 * torch.randn(len(starts), self.width))
        self.blocks = nn.Sequential(*(OfSeries(self.width, 4) for _ in range(2)))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(len(starts) * self.width, self.horizon)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(2, keepdim=True)
        scale = torch.sqrt(((x - mean) ** 2).mean(2, keepdim=True) + 1e-5)
        patches = ((x - mean) / scale)[:, :, self.places]
        seen = self.norm(self.blocks(self.embed(patches) + self.place))
        return self.head(seen.flatten(2)) * scale + mean


class Lstm(nn.Module):
    """An LSTM over the last 96 of the window's hours, normalised by the window."""

    series, horizon = 7, 96
    input_shape = (7, 336)

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(self.series, 64), nn.Linear(64, self.series * self.horizon)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(2, keepdim=True)
        scale = torch.sqrt(((x - mean) ** 2).mean(2, keepdim=True) + 1e-5)
        steps = ((x - mean) / scale)[:, :, -96:].permute(2, 0, 1)
        return self.head(self.rnn(steps)[0][-1]).unflatten(1, (self.series, self.horizon)) * scale + mean


class AutoEncoder(nn.Module):
    """Nine channels of motion through a bottleneck of 4 × 16 numbers."""

    input_shape = (9, 128)

    def __init__(self) -> None:
        super().__init__()
        down, up = (9, 32, 32, 4), (4, 32, 32)
        layers: list[nn.Module] = []
        for before, after in pairwise(down):
            layers += [nn.Conv1d(before, after, 5, 2, 2), nn.Tanh()]
        for before, after in pairwise(up):
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv1d(before, after, 5, 1, 2), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Upsample(scale_factor=2.0), nn.Conv1d(32, 9, 5, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Characters(nn.Module):
    """A causal transformer over characters: for each place a row of logits of the next one [n, vocabulary, length]."""

    input_shape, input_dtype = (64,), "int64"

    def __init__(self, vocabulary: int = 65, width: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(x) + self.place))).transpose(1, 2)


class Fusion(nn.Module):
    """Accelerometer and gyroscope as two inputs, each with convolutions of its own, to one of six activities."""

    input_shape = {"accelerometer": (6, 128), "gyroscope": (3, 128)}  # noqa: RUF012 - as a user writes it

    def __init__(self) -> None:
        super().__init__()
        self.moves, self.turns = self._branch(6), self._branch(3)
        self.head = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 6))

    @staticmethod
    def _branch(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(channels, 32, 7, 2, 3), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Conv1d(32, 48, 5, 2, 2), nn.BatchNorm1d(48), nn.ReLU(),
        )  # fmt: skip

    def forward(self, accelerometer: Tensor, gyroscope: Tensor) -> Tensor:
        return self.head(torch.cat([self.moves(accelerometer).mean(2), self.turns(gyroscope).mean(2)], 1))


class Embedder(nn.Module):
    """Pictures of clothes as 32 numbers."""

    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((1, 16, 32, 64)):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
