"""Small networks that are hard to cut: one for each way in which channels meet that common pruners get wrong.

Each is registered with the number of channel groups that must be found at least, so that a rule that silently keeps
everything fails. All are seeded, and take one tensor of `input_shape`. `whole_models` has networks of the usual kinds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from support.nets.small_nets import randomise_norms


@dataclass(frozen=True)
class Hard:
    """A registered network's class, and the channel groups that must be found at least."""

    make: Callable[[], nn.Module]
    groups: int


NETS: dict[str, Hard] = {}  # networks by name


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


def make(name: str) -> nn.Module:
    """A network by name, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        return randomise_norms(NETS[name].make())


# -- gates and attention ----------------------------------------------------------------------------------------------


@hard(1)
class ECA(Images):
    """A convolution along the channels: those stay."""

    def build(self) -> None:
        self.along, self.last = nn.Conv1d(1, 1, 3, padding=1), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * torch.sigmoid(self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1))[:, :, None, None])


@hard(1)
class ChannelSoftmax(Images):
    """A softmax over channels: these stay, those after it don't."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.softmax(1))


@hard(2)
class PlaceAttention(Images):
    """CBAM's gate for each place, of the mean and largest of its channels; and one of the smallest."""

    def build(self) -> None:
        self.gate, self.last = conv(2, 1, bias=False), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.last(x * torch.sigmoid(self.gate(summary)) - x.amin(1, keepdim=True))


@hard(3)
class TokenMixing(Tokens):
    """MLP-Mixer's and gMLP's layers along tokens: their hidden units and the features go, tokens stay."""

    def build(self) -> None:
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.wide, self.norm, self.gate, self.back = (
            nn.Linear(12, 16),
            nn.LayerNorm(8),
            nn.Conv1d(6, 6, 1),
            nn.Linear(8, 12),
        )

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(functional.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        one, two = functional.gelu(self.wide(x)).chunk(2, -1)
        return x + self.back(one * self.gate(self.norm(two)))


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
        return x + torch.einsum("bhnm,bhmd,hdc->bnc", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v, self.o)


@hard(2)
class CrossAttention(Tokens):
    """Learnt queries look at the tokens; keys and values come of one layer, chunked."""

    def build(self) -> None:
        self.queries = nn.Parameter(torch.randn(1, 4, 12))
        self.q, self.kv = nn.Linear(12, 12), nn.Linear(12, 24)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.queries.expand(x.shape[0], -1, -1)).view(-1, 4, 2, 6).transpose(1, 2)
        k, v = (half.reshape(-1, 6, 2, 6).transpose(1, 2) for half in self.kv(x).chunk(2, -1))
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, 12)


@hard(1)
class GroupedQueries(Tokens):
    """Three queries per key: keys and values are repeated."""

    def build(self) -> None:
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(24, 12)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = (
            projection(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(3, 1)
            for projection in (self.k, self.v)
        )
        return self.out(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


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


# -- convolutions -----------------------------------------------------------------------------------------------------


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


# -- moved channels ---------------------------------------------------------------------------------------------------


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


@hard(3)
class SlicedChannels(Images):
    """A part of the channels alone, beside all of them."""

    def build(self) -> None:
        self.all, self.some = conv(8, 8), conv(5, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.all(x) + self.some(x[:, 1:6]))


@hard(3)
class SliceWrites(Images):
    """Channels that others overwrite, are added to or scale, at constant indices."""

    def build(self) -> None:
        self.some, self.one, self.last = conv(8, 4), conv(8, 1), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        y[:, :4] = self.some(x)
        y[:, 6] += self.one(x)[:, 0]
        y = y.index_add(1, torch.tensor([5, 4]), x[:, 4:6])
        return self.last(y)


@hard(2)
class RolledChannels(Images):
    """Channels moved round: the two parts change places."""

    def build(self) -> None:
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.roll(x, 3, 1))


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
class Maxout(Images):
    """The larger of every two channels."""

    def build(self) -> None:
        self.wide = conv(8, 16)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x).view(-1, 8, 2, 8, 8).amax(2)


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


@hard(1)
class LRNNet(Images):
    """Local response normalisation over neighbouring channels: these stay."""

    def build(self) -> None:
        self.norm, self.last = nn.LocalResponseNorm(3), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))


@hard(3)
class WeightNormed(Images):
    """torch's weight norm: a direction and a length per output channel."""

    def build(self) -> None:
        self.second = nn.utils.parametrizations.weight_norm(conv(8, 8))
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(x)))


@hard(3)
class SpectralNormed(Images):
    """torch's spectral norm: one number for a whole weight, computed with a constant number per channel."""

    def build(self) -> None:
        self.second = nn.utils.parametrizations.spectral_norm(conv(8, 8))
        self.last = conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(x)))


# -- recurrent layers, tied and computed weights, less common operators -----------------------------------------------


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


@hard(2)
class SpatialTransformer(Images):
    """Samples of a map, smoothed and made smaller, at places that a part of the net computes from it."""

    def build(self) -> None:
        self.a, self.b, self.where = conv(8, 6), conv(6, 8), nn.Linear(6, 6)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        theta = self.where(x.mean((2, 3))) * 0.3 + torch.tensor([1.0, 0, 0, 0, 1, 0])
        grid = functional.affine_grid(theta.reshape(-1, 2, 3), list(x.shape), align_corners=False)
        smaller = functional.interpolate(x, size=(5, 6), mode="bilinear", antialias=True)
        return torch.relu(self.b(functional.grid_sample(smaller, grid, align_corners=False)))


@hard(1)
class SegmentSums(Tokens):
    """Tokens added up by segment, and read back from there."""

    def build(self) -> None:
        self.coder = nn.Linear(12, 8)
        self.register_buffer("segment", torch.tensor([0, 2, 2, 1, 0, 1]))

    head_channels = 8

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.coder(x))
        where = self.segment[None, : x.shape[1], None].expand(x.shape)
        return torch.tanh(torch.zeros(x.shape[0], 3, 8).scatter_add(1, where, x).gather(1, where)) + x


@hard(1)
class Spectra(nn.Module):
    """A short-time Fourier transform of raw audio before convolutions."""

    input_shape = (256,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.a, self.b = nn.Conv1d(17, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waves = torch.stft(x, 32, hop_length=16, window=self.window, return_complex=True)
        return self.b(torch.relu(self.a(torch.log(waves.abs().square() + 0.01))).mean(2))


@hard(2)
class PairDistances(Tokens):
    """Distances of tokens to each other and to learnt ones, which exporters lack."""

    def build(self) -> None:
        self.coder, self.own = nn.Linear(12, 8), nn.Parameter(torch.randn(1, 5, 8))

    head_channels = 11

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.coder(x))
        distances = torch.cdist(x, self.own.expand(x.shape[0], 5, 8), p=1.0)
        return torch.cat([torch.cdist(x, x), distances], 2) * 0.1


@hard(1)
class Overlaps(Images):
    """Blocks of a map that are changed, and added up where they overlap; a convolution of whole lines by waves."""

    def build(self) -> None:
        self.a, self.b = conv(8, 6), conv(6, 8)
        self.blocks, self.waves = nn.Linear(54, 54), nn.Parameter(torch.randn(5) * 0.3)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        blocks = functional.unfold(torch.relu(self.a(x)), 3, stride=2, padding=1)
        changed = torch.tanh(self.blocks(blocks.transpose(1, 2))).transpose(1, 2)
        image = functional.fold(changed, (8, 8), 3, stride=2, padding=1)
        waves = torch.view_as_real(torch.fft.rfft(image)) * self.waves[:, None]
        return torch.relu(self.b(torch.fft.irfft(torch.view_as_complex(waves), n=8)))


@hard(1)
class ChannelsAsPlaces(Images):
    """A map whose channels become lines, over which a group normalisation averages and a convolution moves."""

    def build(self) -> None:
        self.a, self.b, self.c, self.d = conv(8, 6), conv(8, 6), conv(6, 8), conv(6, 8)
        self.norm, self.across = nn.GroupNorm(2, 8), conv(8, 8)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        one = self.norm(torch.relu(self.a(x)).transpose(1, 2))
        two = self.across(torch.relu(self.b(x)).transpose(1, 2))
        return torch.relu(self.c(one.transpose(1, 2)) + self.d(two.transpose(1, 2)))
