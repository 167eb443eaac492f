"""Hard networks with gates and attention, over channels and over tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from support.nets.hard_register import Images, Tokens, conv, hard


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
