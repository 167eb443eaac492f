"""Small networks without kinks: their gradients have no signs that rounding could flip, so that trainers can be
compared over many steps. One for each family: residual, inverted residual, one-dimensional."""

from __future__ import annotations

import torch
from torch import nn

from support.nets.small_nets import BasicBlock, seeded


class SmoothResNet(nn.Module):
    """Two stages of residual blocks."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8, momentum=0.3)
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1, torch.tanh), BasicBlock(8, 16, 2, torch.tanh))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(torch.tanh(self.bn(self.stem(x)))).mean((2, 3)))


class SmoothMobileNet(nn.Module):
    """An inverted residual with a depthwise convolution and a squeeze-and-excitation gate."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = torch.sigmoid(self.excite(torch.tanh(self.squeeze(nn.functional.adaptive_avg_pool2d(y, 1)))))
        return self.fc((x + self.project(y * gate)).mean((2, 3)))


class SmoothSignal(nn.Module):
    """Convolutions over time, as for sensors."""

    input_shape = (4, 24)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(4, 8, 5, padding=2), nn.BatchNorm1d(8), nn.GELU(), nn.AvgPool1d(2), nn.Conv1d(8, 12, 3), nn.GELU()
        )
        self.fc = nn.Linear(12 * 10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.body(x), 1))


class SmoothPerceptron(nn.Module):
    """Two layers and no normalisation."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


NETS = {kind.__name__: kind for kind in (SmoothResNet, SmoothMobileNet, SmoothSignal, SmoothPerceptron)}


def make(name: str) -> nn.Module:
    """A network by name, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return seeded(NETS[name]())
