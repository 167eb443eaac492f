"""Hard networks with convolutions of every kind."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from support.nets.hard_register import Images, conv, hard


@hard(2)
class GroupedConvs(Images):
    """Grouped convolutions with several channels per group."""

    def build(self) -> None:
        self.a, self.b = conv(8, 12, groups=4), conv(12, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@hard(2)
class TransposedConvs(Images):
    """Transposed convolutions: plain, depthwise, in groups."""

    def build(self) -> None:
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.depth = nn.ConvTranspose2d(6, 6, 3, 1, 1, groups=6)
        self.grouped = nn.ConvTranspose2d(6, 9, 3, 1, 1, groups=3)
        self.last = conv(9, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.grouped(torch.relu(self.depth(self.up(x))))))


@hard(2)
class DepthMultiplier(Images):
    """A depthwise convolution that makes two channels of each."""

    def build(self) -> None:
        self.depth, self.point = conv(8, 16, groups=8), nn.Conv2d(16, 8, 1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(torch.relu(self.depth(x)))


@hard(2)
class Ghost(Images):
    """GhostNet: half of the channels are made of the others by a cheap depthwise convolution."""

    head_channels = 12

    def build(self) -> None:
        self.main, self.cheap = nn.Conv2d(8, 6, 1), conv(6, 6, groups=6)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.main(x))
        return torch.cat([x, torch.relu(self.cheap(x))], 1)


@hard(3)
class UNet(Images):
    """Down, up, and across."""

    def build(self) -> None:
        self.down, self.up, self.last = conv(8, 12, stride=2), nn.ConvTranspose2d(12, 8, 2, 2), conv(16, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, torch.relu(self.up(torch.relu(self.down(x))))], 1))


@hard(3)
class Pyramid(Images):
    """Interpolation to the size of another map."""

    def build(self) -> None:
        self.down, self.side, self.last = conv(8, 6, stride=2), nn.Conv2d(8, 6, 1), conv(6, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.down(x))
        y = functional.interpolate(y, size=x.shape[2:], mode="nearest")
        y = y + self.side(x)
        return self.last(functional.interpolate(y, scale_factor=0.5, mode="bilinear"))


@hard(3)
class ConvNeXt(Images):
    """Depthwise convolution, layer norm on channels last, inverted bottleneck, layer scale, residual."""

    def build(self) -> None:
        self.depth, self.norm = conv(8, 8, 5, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.scale = nn.Linear(8, 20), nn.Linear(20, 8), nn.Parameter(torch.rand(8))
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        return self.last(x + y.permute(0, 3, 1, 2))


@hard(3)
class InvertedResidual(Images):
    """MobileNetV3: expand, depthwise, squeeze and excite, project, add."""

    def build(self) -> None:
        self.up, self.depth, self.down = nn.Conv2d(8, 16, 1), conv(16, 16, groups=16), nn.Conv2d(16, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (16, 16, 8))
        self.reduce, self.expand = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.hardswish(self.norms[0](self.up(x)))
        y = functional.hardswish(self.norms[1](self.depth(y)))
        gate = self.expand(torch.relu(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.norms[2](self.down(y * functional.hardsigmoid(gate)))


@hard(2)
class Separable1d(nn.Module):
    """A 1-D net for sensors, flattened at the end."""

    input_shape = (4, 24)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8)
        self.depth, self.point = nn.Conv1d(8, 8, 3, dilation=2, padding=2, groups=8), nn.Conv1d(8, 10, 1)
        self.head = nn.Linear(30, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool1d(torch.relu(self.norm(self.first(x))), 2)
        x = functional.avg_pool1d(torch.relu(self.point(self.depth(x))), 4)
        return self.head(x.flatten(1))


@hard(2)
class Video(nn.Module):
    """3-D convolutions."""

    input_shape = (2, 4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.second, self.head = nn.Conv3d(6, 8, (1, 3, 3)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool3d(torch.relu(self.norm(self.first(x))), (2, 1, 1))
        return self.head(torch.relu(self.second(x)).mean((2, 3, 4)))


@hard(3)
class AdaptivePools(Images):
    """Adaptive pools that divide the map and some that don't."""

    head_channels = 10

    def build(self) -> None:
        self.second, self.flat = conv(8, 6), nn.Linear(6 * 9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.adaptive_avg_pool2d(torch.relu(self.stem(x)), 4)
        x = functional.adaptive_avg_pool2d(torch.relu(self.second(x)), 3)
        return self.head(torch.relu(self.flat(x.flatten(1))))
