"""Small networks that are hard to cut: one for each way in which channels meet that common pruners get wrong.

Every class is registered with the number of channel groups that must be found at least, so that a rule that silently
keeps everything fails; 0 where keeping everything is right. All are seeded, and take one tensor of `input_shape`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from nets import seeded


@dataclass(frozen=True)
class Hard:
    """A network of this module.

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


def make(name: str) -> nn.Module:
    """A network by name, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return seeded(NETS[name].make())


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


# -- gates and attention over channels -------------------------------------------------------------------------------


@hard(2)
class SqueezeExcite(Images):
    """Channels scaled by a gate that is computed from their own means."""

    def build(self) -> None:
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(torch.relu(self.down(functional.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(gate)


@hard(2)
class OneChannelGate(Images):
    """A gate of one channel scales 8 others: it ties nothing."""

    def build(self) -> None:
        self.gate, self.last = nn.Conv2d(8, 1, 1), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * torch.sigmoid(self.gate(x)))


@hard(1)
class ECA(Images):
    """A convolution along the channels: those stay."""

    def build(self) -> None:
        self.along, self.last = nn.Conv1d(1, 1, 3, padding=1), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.last(x * torch.sigmoid(y)[:, :, None, None])


@hard(2)
class CBAM(Images):
    """Channel attention, then a map of the mean and the maximum over channels."""

    def build(self) -> None:
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.space, self.last = conv(2, 1), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        mean, most = x.mean((2, 3)), x.amax((2, 3))
        gate = torch.sigmoid(self.up(torch.relu(self.down(mean))) + self.up(torch.relu(self.down(most))))
        x = x * gate[:, :, None, None]
        where = self.space(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.last(x * torch.sigmoid(where))


@hard(3)
class SKNet(Images):
    """Two branches weighted by a softmax over the branches."""

    def build(self) -> None:
        self.a, self.b = conv(8, 6), conv(8, 6, 5)
        self.down, self.up = nn.Linear(6, 4), nn.Linear(4, 12)
        self.head_channels = 6

    def __init__(self) -> None:
        self.__class__.head_channels = 6
        super().__init__()

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([self.a(x), self.b(x)], 1)
        means = both.sum(1).mean((2, 3))
        weights = self.up(torch.relu(self.down(means))).view(-1, 2, 6).softmax(1)
        return (both * weights[:, :, :, None, None]).sum(1)


@hard(1)
class ChannelSoftmax(Images):
    """A softmax over channels: these stay, those after it don't."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.softmax(1))


# -- attention over tokens -------------------------------------------------------------------------------------------


@hard(1)
class MultiheadAttention(Tokens):
    """torch's own attention."""

    def build(self) -> None:
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@hard(2)
class TransformerEncoder(Tokens):
    """torch's encoder layers, norms first and last."""

    def build(self) -> None:
        layers = [
            nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=i > 0, activation="gelu")
            for i in range(2)
        ]
        self.layers = nn.Sequential(*layers)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@hard(2)
class FusedAttention(Tokens):
    """Attention as timm writes it: one layer for q, k and v, split in three, heads and dims by a reshape."""

    def build(self) -> None:
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(b, n, 12))


@hard(2)
class CausalAttention(Tokens):
    """Separate q, k and v, and a mask."""

    def build(self) -> None:
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (3, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@hard(2)
class OneHead(Tokens):
    """One head: only its dims can be cut, those of q with k's, those of v alone."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2) * 0.4).softmax(-1)
        return x + weights @ self.v(x)


@hard(2)
class EinsumAttention(Tokens):
    """Attention in einsum, weights with an axis of heads of their own."""

    def build(self) -> None:
        self.q = nn.Parameter(torch.randn(12, 3, 4) * 0.3)
        self.k = nn.Parameter(torch.randn(12, 3, 4) * 0.3)
        self.v = nn.Parameter(torch.randn(12, 3, 4) * 0.3)
        self.o = nn.Parameter(torch.randn(3, 4, 12) * 0.3)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return x + torch.einsum("bhnm,bhmd,hdc->bnc", weights, v, self.o)


@hard(2)
class CrossAttention(Tokens):
    """Learnt queries look at the tokens; keys and values come of one layer, chunked."""

    def build(self) -> None:
        self.queries = nn.Parameter(torch.randn(1, 4, 12))
        self.q, self.kv = nn.Linear(12, 12), nn.Linear(12, 24)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.queries.expand(x.shape[0], -1, -1)).view(-1, 4, 2, 6).transpose(1, 2)
        k, v = (part.reshape(-1, 6, 2, 6).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 12)


@hard(1)
class GroupedQueries(Tokens):
    """Three queries per key: keys and values are repeated."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(24, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(3, 1) for part in (self.k, self.v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@hard(3)
class TinyViT(nn.Module):
    """Patches, a class token, positions, two blocks with a layer scale, a norm."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12) * 0.5)
        self.places = nn.Parameter(torch.randn(1, 5, 12) * 0.5)
        self.blocks = nn.ModuleList(FusedAttention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(12)) for _ in range(2))
        for block in self.blocks:
            del block.embed, block.head
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block, norm, mlp, scale in zip(self.blocks, self.norms, self.mlps, self.scales, strict=True):
            x = block.middle(x)
            x = x + scale * mlp(norm(x))
        return self.head(self.norm(x)[:, 0])


@hard(2)
class SwinBlock(Images):
    """Windows, cyclic shift, a bias by relative place, patch merging."""

    def build(self) -> None:
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.table = nn.Parameter(torch.randn(49, 2) * 0.3)
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = grid[:, :, None] - grid[:, None, :]
        self.register_buffer("places", ((apart[0] + 3) * 7 + apart[1] + 3).flatten())
        self.merge_norm, self.merge = nn.LayerNorm(32), nn.Linear(32, 8, bias=False)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.reshape(-1, 2, 4, 2, 4, 8).transpose(2, 3).reshape(-1, 16, 8)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = q @ k.transpose(-2, -1) * 0.5 + self.table[self.places].view(16, 16, 2).permute(2, 0, 1)
        y = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, 8))
        y = y.reshape(-1, 2, 2, 4, 4, 8).transpose(2, 3).reshape(-1, 8, 8, 8)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.merge(self.merge_norm(x)).permute(0, 3, 1, 2)


@hard(2)
class FoldedPatches(Images):
    """MobileViT: channels folded into the batch with the rows of patches, attention between patches, and back."""

    def build(self) -> None:
        self.attention, self.last = nn.Linear(8, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(-1, 4, 2).reshape(x.shape[0] * 8 * 4, 2, 4, 2).transpose(1, 2).reshape(-1, 8, 16, 4)
        y = y.transpose(1, 3)
        y = y + torch.relu(self.attention(y))
        y = y.transpose(1, 3).reshape(x.shape[0] * 8 * 4, 4, 2, 2).transpose(1, 2).reshape(-1, 8, 8, 8)
        return self.last(y)


@hard(3)
class Mixer(Tokens):
    """Layers across the tokens and across the channels."""

    def build(self) -> None:
        self.norm = nn.LayerNorm(12)
        self.across = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
        self.along = nn.Sequential(nn.Linear(12, 14), nn.GELU(approximate="tanh"), nn.Linear(14, 12))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm(x))


# -- recurrent layers ------------------------------------------------------------------------------------------------


@hard(3)
class TwoLSTMs(Tokens):
    """Two layers, both directions."""

    head_channels = 14

    def build(self) -> None:
        self.lstm = nn.LSTM(12, 7, 2, batch_first=True, bidirectional=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


@hard(2)
class TwoGRUs(Tokens):
    """Two layers, both directions, and the state at the end."""

    head_channels = 14

    def build(self) -> None:
        self.gru = nn.GRU(12, 7, 2, batch_first=True, bidirectional=True)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.gru(x)
        return y + torch.cat([state[-2], state[-1]], -1)[:, None]


@hard(2)
class PlainRNN(Tokens):
    """The simplest recurrence, with an initial state that is learnt."""

    head_channels = 7

    def build(self) -> None:
        self.rnn = nn.RNN(12, 7, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 7))

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x, self.start.expand(-1, x.shape[0], -1).contiguous())[0]


@hard(3)
class CRNN(nn.Module):
    """A convolution's columns as the steps of a GRU."""

    input_shape = (1, 8, 12)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(1, 6), nn.BatchNorm2d(6), conv(6, 8)
        self.gru = nn.GRU(8 * 4, 9, batch_first=True, bidirectional=True)
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(self.second(torch.relu(self.norm(self.first(x))))), (2, 1))
        x = x.permute(0, 3, 1, 2).flatten(2)
        return self.head(self.gru(x)[0][:, -1])


# -- norms -----------------------------------------------------------------------------------------------------------


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


# -- moving channels about -------------------------------------------------------------------------------------------


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


# -- convolutions ----------------------------------------------------------------------------------------------------


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


# -- other operators -------------------------------------------------------------------------------------------------


@hard(2)
class Activations(Images):
    """Mish, SiLU, GELU in both forms, softplus, ELU, a slope per channel, hard and soft."""

    def build(self) -> None:
        self.second, self.slope = conv(8, 8), nn.PReLU(8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.mish(x) + functional.silu(x) - functional.gelu(x) * functional.gelu(x, approximate="tanh")
        x = self.slope(self.second(x))
        x = functional.softplus(x) + functional.elu(x) + functional.hardtanh(x) + functional.softsign(x)
        return x + x.erf() + x.sin() * x.cos() + x.floor() * 0.1 + x.sign() + torch.where(x > 0.3, x, x * x)


@hard(1)
class TiedWeights(Tokens):
    """One matrix used twice, as it is and transposed."""

    def build(self) -> None:
        self.coder = nn.Linear(12, 9, bias=False)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.coder(x)) @ self.coder.weight + x


@hard(2)
class BilinearPair(Tokens):
    """A product of two layers and a third-order tensor."""

    head_channels = 7

    def build(self) -> None:
        self.a, self.b, self.both = nn.Linear(12, 8), nn.Linear(12, 6), nn.Bilinear(8, 6, 7)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(torch.relu(self.a(x)), torch.relu(self.b(x)))


@hard(2)
class LowRank(Images):
    """A weight that is the product of two others, and scaled."""

    def build(self) -> None:
        self.left, self.right = nn.Parameter(torch.randn(8, 5) * 0.5), nn.Parameter(torch.randn(5, 8) * 0.5)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.left @ self.right * 0.5)[:, :, None, None]
        return torch.relu(functional.conv2d(x, weight))


@hard(2)
class SecondMoments(Images):
    """Products of channels with channels, flattened: one of the two axes stays."""

    head_channels = 24

    def build(self) -> None:
        self.a, self.b = conv(8, 6), conv(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        products = self.a(x).flatten(2) @ self.b(x).flatten(2).transpose(1, 2)
        return self.head(products.flatten(1) / 64)


@hard(2)
class Distances(Tokens):
    """Squared distances to learnt prototypes: sums over channels."""

    def build(self) -> None:
        self.coder = nn.Linear(12, 8)
        self.prototypes = nn.Parameter(torch.randn(7, 8))

    head_channels = 7

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        apart = torch.relu(self.coder(x))[:, :, None, :] - self.prototypes
        return torch.exp(-apart.square().sum(-1) * 0.1)


@hard(1)
class MaskedTokens(Tokens):
    """Comparisons and choices that depend on the data."""

    def build(self) -> None:
        self.second = nn.Linear(12, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(x))
        return torch.where((y > x) & ~(x < 0), y, torch.minimum(x, y * 2).clamp(-1, 1))
