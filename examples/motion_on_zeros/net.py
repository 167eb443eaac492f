"""The model: convolutions over time for nine signals of 128 steps, six activities. Nothing in it knows of fedprune."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MotionNet(nn.Module):
    """Three one-dimensional convolutions with batch normalisation, 145 k parameters."""

    input_shape = (9, 128)

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(*self.layer(9, 64, 9), *self.layer(64, 128, 7), *self.layer(128, 128, 5))
        self.head = nn.Linear(128, classes)

    @staticmethod
    def layer(before: int, after: int, kernel: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv1d(before, after, kernel, padding=kernel // 2, bias=False)
        return convolution, nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(2)

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.features(signals).mean(2))


def motion_net() -> MotionNet:
    """The same weights every time: a run that was cut off continues with its own model alone."""
    torch.manual_seed(0)
    return MotionNet()
