"""Hard networks with norms, of activations and of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from support.nets.hard_register import Images, Tokens, conv, hard


@hard(2)
class GroupNorms(Images):
    """Norm groups of several channels."""

    def build(self) -> None:
        self.norm, self.second, self.last = nn.GroupNorm(4, 8), conv(8, 12), conv(12, 8)
        self.other = nn.GroupNorm(3, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(x))
        return self.last(torch.relu(self.other(self.second(x))))


@hard(2)
class OneGroupNorm(Images):
    """A group norm of one group: positions within it can go."""

    def build(self) -> None:
        self.norm, self.last = nn.GroupNorm(1, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(x)))


@hard(2)
class InstanceNorms(Images):
    """Instance norms with and without vectors."""

    def build(self) -> None:
        self.plain, self.affine, self.last = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True), conv(8, 8)
        self.second = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.plain(x)))
        return self.last(torch.relu(self.affine(x)))


@hard(2)
class WideLayerNorm(Images):
    """A layer norm over channels and places."""

    def build(self) -> None:
        self.norm, self.last = nn.LayerNorm((8, 8, 8)), conv(8, 8)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(8, 8, 8) + 0.5)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(x)))


@hard(2)
class RMSNorms(Tokens):
    """torch's root mean square norm before a gated layer."""

    def build(self) -> None:
        self.norm, self.up, self.down = nn.RMSNorm(12), nn.Linear(12, 20), nn.Linear(10, 12)
        with torch.no_grad():
            self.norm.weight.copy_(torch.rand(12) + 0.5)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(functional.silu(a) * b)


@hard(1)
class LRNNet(Images):
    """Local response normalisation over neighbouring channels: these stay."""

    def build(self) -> None:
        self.norm, self.last = nn.LocalResponseNorm(3), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))


@hard(3)
class WeightStandardised(Images):
    """Weights of zero mean and unit variance per output channel, over what is kept of the input channels."""

    def build(self) -> None:
        self.second, self.last = conv(8, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        w = self.second.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-4)
        return self.last(torch.relu(functional.conv2d(x, w, self.second.bias, padding=1)))


@hard(3)
class WeightNormed(Images):
    """torch's weight norm: a direction and a length per output channel."""

    def build(self) -> None:
        self.second = nn.utils.parametrizations.weight_norm(conv(8, 8))
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(x)))


@hard(2)
class UnitLength(Images):
    """Features of unit length over the channels."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.normalize(x, dim=1))
