"""The register of small networks that are hard to cut, and what they are built of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Hard:
    """A registered network.

    Attributes:
        make: Its class.
        groups: Channel groups that must be found at least.
    """

    make: Callable[[], nn.Module]
    groups: int


NETS: dict[str, Hard] = {}
"""Networks by name."""


def hard(groups: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        NETS[kind.__name__] = Hard(kind, groups)
        return kind

    return register


def conv(before: int, after: int, kernel: int = 3, **arguments: object) -> nn.Conv2d:
    """A convolution that keeps the size of its map."""
    arguments.setdefault("padding", kernel // 2)
    return nn.Conv2d(before, after, kernel, **arguments)


class Images(nn.Module):
    """A net for 8×8 images: a stem, what `middle` does, a head on the mean of all places."""

    input_shape = (3, 8, 8)
    stem_channels = 8
    head_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, self.stem_channels)
        self.build()
        self.head = nn.Linear(self.head_channels, 5)

    def build(self) -> None:
        """Make the parts of the middle."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(torch.relu(self.stem(x))).mean((2, 3)))


class Tokens(nn.Module):
    """A net for six tokens of ten numbers: an embedding, what `middle` does, a head on the mean of all tokens."""

    input_shape = (6, 10)
    width = 12
    head_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, self.width)
        self.build()
        self.head = nn.Linear(self.head_channels, 5)

    def build(self) -> None:
        """Make the parts of the middle."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(x)).mean(1))
