"""Hard networks that move channels about."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from support.nets.hard_register import Images, conv, hard


@hard(3)
class DenseConcat(Images):
    """Concatenations of concatenations, normalised as a whole."""

    head_channels = 16

    def build(self) -> None:
        self.a, self.b = conv(8, 4, bias=False), conv(12, 4, bias=False)
        self.norm_a, self.norm_b, self.norm = nn.BatchNorm2d(8), nn.BatchNorm2d(12), nn.BatchNorm2d(16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, self.a(torch.relu(self.norm_a(x)))], 1)
        x = torch.cat([x, self.b(torch.relu(self.norm_b(x)))], 1)
        return torch.relu(self.norm(x))


@hard(4)
class ChunkConcat(Images):
    """Two halves of one layer go different ways and meet again."""

    def build(self) -> None:
        self.a, self.b, self.last = conv(4, 6), conv(4, 5), conv(11, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        return self.last(torch.relu(torch.cat([self.b(b), self.a(a)], 1)))


@hard(2)
class ShuffleUnit(Images):
    """ShuffleNetV2: half of the channels pass, a shuffle mixes the halves."""

    def build(self) -> None:
        for i in range(2):
            self.add_module(f"in{i}", nn.Conv2d(4, 4, 1))
            self.add_module(f"depth{i}", conv(4, 4, groups=4))
            self.add_module(f"out{i}", nn.Conv2d(4, 4, 1))
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            a, b = x.chunk(2, 1)
            for part in ("in", "depth", "out"):
                b = torch.relu(self.get_submodule(f"{part}{i}")(b))
            x = torch.cat([a, b], 1).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
        return self.last(x)


@hard(2)
class GroupShuffle(Images):
    """ShuffleNet: grouped convolutions on either side of a shuffle."""

    def build(self) -> None:
        self.a, self.depth, self.b = (
            nn.Conv2d(8, 12, 1, groups=2),
            conv(12, 12, groups=12),
            nn.Conv2d(12, 8, 1, groups=2),
        )

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x)).view(-1, 2, 6, 8, 8).transpose(1, 2).flatten(1, 2)
        return torch.relu(x + self.b(self.depth(y)))


@hard(2)
class PadShortcut(Images):
    """The shortcut without weights of the first ResNets: every second place, channels padded with zeros."""

    head_channels = 16

    def build(self) -> None:
        self.a, self.b = conv(8, 16, stride=2), conv(16, 16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        return torch.relu(y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


@hard(2)
class StridedChannels(Images):
    """Every second channel alone."""

    def build(self) -> None:
        self.last = conv(4, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x[:, ::2])


@hard(3)
class SlicedChannels(Images):
    """A part of the channels alone, beside all of them."""

    def build(self) -> None:
        self.all, self.some = conv(8, 8), conv(5, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.all(x) + self.some(x[:, 1:6]))


@hard(2)
class PickedChannels(Images):
    """Channels by their numbers."""

    def build(self) -> None:
        self.register_buffer("which", torch.tensor([0, 1, 2, 5, 6]))
        self.some, self.all = conv(5, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.some(x.index_select(1, self.which)) + self.all(x)


@hard(2)
class RolledChannels(Images):
    """Channels moved round: the two parts change places."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.roll(x, 3, 1))


@hard(0)
class FlippedChannels(Images):
    """Channels in reverse order: no order of ranks serves both sides."""

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)


@hard(1)
class SummedChannels(Images):
    """Sums along the channels: these stay."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.cumsum(1) * 0.2)


@hard(3)
class PixelShuffles(Images):
    """Channels become places, and places channels again."""

    def build(self) -> None:
        self.wide, self.back, self.last = conv(8, 24), conv(6, 5), conv(20, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.back(functional.pixel_shuffle(self.wide(x), 2)))
        return self.last(functional.pixel_unshuffle(x, 2))


@hard(2)
class Focus(nn.Module):
    """YOLO's stem: four strided slices of the image side by side."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(12, 8), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@hard(2)
class Maxout(Images):
    """The larger of every two channels."""

    def build(self) -> None:
        self.wide = conv(8, 16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x).view(-1, 8, 2, 8, 8).amax(2)


@hard(2)
class StackedMax(Images):
    """The larger of two layers, place by place."""

    def build(self) -> None:
        self.a, self.b = conv(8, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.a(x), self.b(x)]).amax(0)


@hard(2)
class GatedUnits(Images):
    """GLU: one half of a layer gates the other."""

    def build(self) -> None:
        self.wide, self.last = conv(8, 12), conv(6, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.glu(self.wide(x), 1))


@hard(2)
class Unfolded(Images):
    """A convolution written as patches and a matrix."""

    def build(self) -> None:
        self.matrix, self.bias = nn.Parameter(torch.randn(8, 72) * 0.2), nn.Parameter(torch.randn(8))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.matrix @ functional.unfold(x, 3, padding=1) + self.bias[:, None]
        return torch.relu(y).reshape(-1, 8, 8, 8)
