"""The model: a small convolutional network for 28×28 grey images. Nothing in it knows of fedprune."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClothesNet(nn.Module):
    """Three convolutions with batch normalisation, 94 k parameters."""

    input_shape = (1, 28, 28)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self.layer(1, 32), nn.MaxPool2d(2), *self.layer(32, 64), nn.MaxPool2d(2), *self.layer(64, 128)
        )
        self.head = nn.Linear(128, classes)

    @staticmethod
    def layer(before: int, after: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


def clothes_net() -> ClothesNet:
    """The same weights every time: a run that was cut off continues with its own model alone."""
    torch.manual_seed(0)
    return ClothesNet()
