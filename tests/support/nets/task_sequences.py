"""Small networks for audio, forecasts, language, and several sensors: classes for `whole_models`.

Every module says its `input_shape` (one sample); those of several inputs, one for each.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from support.nets.whole_sequences import Attention


class Crnn(nn.Module):
    """Raw audio: a short-time Fourier transform, bands, convolutions, a GRU in both directions."""

    input_shape = (256,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(32))
        self.register_buffer("bands", torch.linspace(0, 1, 17)[None].sub(torch.linspace(0, 1, 8)[:, None]).abs())
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.rnn = nn.GRU(12 * 2, 10, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.stft(x, 32, 16, window=self.window, center=True, return_complex=True)
        x = torch.log((self.bands @ waves.abs().square()) + 1e-2).unsqueeze(1)
        x = functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        x = functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), (2, 1))
        x = x.permute(0, 3, 1, 2).flatten(2)
        return self.head(self.rnn(x)[0].mean(1))


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates, whose skips are added; nothing reads the last one's own output."""

    input_shape = (1, 32)

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, 8, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(8, 20, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(10, 12, 1) for _ in range(4))
        self.back = nn.ModuleList(nn.Conv1d(10, 8, 1) for _ in range(4))
        self.last, self.head = nn.Conv1d(12, 12, 1), nn.Conv1d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), 0
        for i, (dilated, skip, back) in enumerate(zip(self.dilated, self.skips, self.back, strict=True)):
            wave, gate = dilated(functional.pad(x, (2**i, 0))).chunk(2, 1)
            gated = torch.tanh(wave) * torch.sigmoid(gate)
            total, x = total + skip(gated), x + back(gated)
        return self.head(torch.relu(self.last(torch.relu(total))))


class PatchTransformer(nn.Module):
    """A transformer over patches of each series, which is normalised by itself with learnt scales and back."""

    input_shape = (3, 32)

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.scale, self.shift = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.zeros(3, 1))
        self.embed, self.places = nn.Linear(8, width), nn.Parameter(torch.randn(7, width) * 0.1)
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.fc1, self.fc2, self.head = nn.Linear(width, 24), nn.Linear(24, width), nn.Linear(7 * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = x.mean(2, keepdim=True), torch.sqrt(x.var(2, keepdim=True, unbiased=False) + 1e-2)
        x = (x - mean) / spread * self.scale + self.shift
        x = self.embed(functional.pad(x, (0, 0)).unfold(2, 8, 4)) + self.places
        x = x.flatten(0, 1)
        x = self.norm1((x + self.attention(x)).transpose(1, 2)).transpose(1, 2)
        x = self.norm2((x + self.fc2(functional.gelu(self.fc1(x)))).transpose(1, 2)).transpose(1, 2)
        x = self.head(x.flatten(1)).unflatten(0, (-1, 3))
        return (x - self.shift) / (self.scale + 1e-10) * spread + mean


class NBeats(nn.Module):
    """Blocks of dense layers that each explain a part of the window and forecast by it: trend, season, anything."""

    input_shape = (24,)

    def __init__(self) -> None:
        super().__init__()
        at = torch.arange(32, dtype=torch.float32)[None] / 32
        angles = 2 * math.pi * at * torch.arange(1, 4)[:, None]
        self.register_buffer("trend", at ** torch.arange(3)[:, None])
        self.register_buffer("season", torch.cat([torch.cos(angles), torch.sin(angles)]))
        self.layers, self.codes = nn.ModuleList(), nn.ModuleList()
        for size in (3, 6, 10):
            self.layers.append(nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU()))
            self.codes.append(nn.Linear(16, size, bias=False))
        self.any = nn.Linear(10, 32)

    def forward(self, x: Tensor) -> Tensor:
        left, total = x, torch.zeros_like(x[:, :8])
        for layers, code, basis in zip(self.layers, self.codes, (self.trend, self.season, None), strict=True):
            forecast = code(layers(left))
            back, ahead = (self.any(forecast) if basis is None else forecast @ basis).split((24, 8), 1)
            left, total = left - back, total + ahead
        return total


class Tcn(nn.Module):
    """Causal convolutions with normalised weights, in blocks of two with a shortcut."""

    input_shape = (4, 20)

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.pairs, self.shortcuts = nn.ModuleList(), nn.ModuleList()
        for i, (before, after) in enumerate(pairwise((4, 12, 16))):
            convs = [nn.Conv1d(a, after, 3, padding=2 * 2**i, dilation=2**i) for a in (before, after)]
            self.pairs.append(nn.ModuleList(norm(conv) for conv in convs))
            self.shortcuts.append(nn.Conv1d(before, after, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, (pair, shortcut) in enumerate(zip(self.pairs, self.shortcuts, strict=True)):
            value = x
            for conv in pair:
                value = torch.relu(conv(value)[:, :, : -2 * 2**i].contiguous())
            x = torch.relu(value + shortcut(x))
        return self.head(x[:, :, -1])


class DLinear(nn.Module):
    """A moving average and what is left, each by one dense layer over time: there is nothing to cut."""

    input_shape = (5, 24)

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        slow = functional.avg_pool1d(torch.cat([x[:, :, :1].repeat(1, 1, 3), x, x[:, :, -1:].repeat(1, 1, 3)], 2), 7, 1)
        return self.slow(slow) + self.fast(x - slow)


class Llama(nn.Module):
    """Two blocks with RMS norms, rotated queries and keys, keys and values that heads share, and gated layers."""

    input_shape, input_dtype = (8,), "int64"

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, size = heads, shared, width // heads
        self.words, self.norm, self.head = nn.Embedding(40, width), nn.RMSNorm(width), nn.Linear(width, 40, bias=False)
        rates = 100.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(8)[:, None] * torch.cat([rates, rates])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.RMSNorm(width), "norm2": nn.RMSNorm(width), "q": nn.Linear(width, width, bias=False),
            "k": nn.Linear(width, shared * size, bias=False), "v": nn.Linear(width, shared * size, bias=False),
            "o": nn.Linear(width, width, bias=False), "gate": nn.Linear(width, 24, bias=False),
            "up": nn.Linear(width, 24, bias=False), "down": nn.Linear(24, width, bias=False),
        }) for _ in range(2))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = x + self.attend(block, block["norm1"](x))
            y = block["norm2"](x)
            x = x + block["down"](functional.silu(block["gate"](y)) * block["up"](y))
        return self.head(self.norm(x)).transpose(1, 2)

    def attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        q = self.rotate(block["q"](x).view(n, steps, self.heads, -1).transpose(1, 2))
        k = self.rotate(block["k"](x).view(n, steps, self.shared, -1).transpose(1, 2))
        v = block["v"](x).view(n, steps, self.shared, -1).transpose(1, 2)
        times = self.heads // self.shared
        k, v = (t[:, :, None].expand(n, self.shared, times, steps, -1).reshape(q.shape) for t in (k, v))
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block["o"](context.transpose(1, 2).reshape(n, steps, width))

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 3)
        return x * self.cos + torch.cat([-right, left], 3) * self.sin


class Alibi(nn.Module):
    """Attention that sinks with distance, all heads with one key and value, beside a dense layer; tied embedding."""

    input_shape, input_dtype = (8,), "int64"

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.norm, self.last = nn.Embedding(40, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, width + 2 * width // heads), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)
        at = torch.arange(8)
        sink = (at[None] - at[:, None]) * 2.0 ** -torch.arange(1, heads + 1)[:, None, None]
        self.register_buffer("bias", sink.masked_fill(at[None] > at[:, None], -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        y = self.norm(x)
        q, k, v = self.qkv(y).split((16, 4, 4), 2)
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        weights = (q @ k.unsqueeze(1).transpose(2, 3) / 2 + self.bias).softmax(-1)
        context = (weights @ v.unsqueeze(1)).transpose(1, 2).flatten(2)
        x = x + self.out(context) + self.fc2(functional.gelu(self.fc1(y), approximate="tanh"))
        return (self.last(x) @ self.words.weight.T).transpose(1, 2)


class LowRank(nn.Module):
    """A frozen dense layer with an adapter beside it, as PEFT writes it."""

    def __init__(self, before: int, after: int, rank: int = 6) -> None:
        super().__init__()
        self.base_layer = nn.Linear(before, after).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(before, rank, bias=False), nn.Linear(rank, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * 2.0


class LoraReader(nn.Module):
    """A frozen block with adapters beside its dense layers, learnt scales of values (IA³), and a head of its own."""

    input_shape, input_dtype = (8,), "int64"

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.norm1, self.norm2 = nn.Embedding(40, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)
        self.requires_grad_(False)
        self.q, self.out, self.fc1 = LowRank(width, width), LowRank(width, width), LowRank(width, 24)
        self.fc2, self.values, self.inner = (
            LowRank(24, width),
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.ones(24)),
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        y = self.norm1(x)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (self.q(y), self.k(y), self.v(y) * self.values))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))) * self.inner)
        return self.head(x.mean(1))


class AdaptedEncoder(nn.Module):
    """A frozen encoder of torch's with learnt prompts before it and a bottleneck adapter behind it."""

    input_shape = (6, 10)

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = nn.Linear(10, width)
        self.layer = nn.TransformerEncoderLayer(width, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True)
        self.requires_grad_(False)
        self.prompts = nn.Parameter(torch.randn(1, 3, width) * 0.3)
        self.down, self.up, self.head = nn.Linear(width, 8), nn.Linear(8, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prompts.expand(x.shape[0], -1, -1), self.enter(x)], 1)
        x = self.layer(x)
        x = x + self.up(torch.relu(self.down(x)))
        return self.head(x[:, 0])


class TwoTowers(nn.Module):
    """A user by number and history, an item by features: directions, their cosine times a learnt gain, and a rating."""

    input_shape = {"user": (), "history": (5,), "item": (12,)}  # noqa: RUF012
    input_dtype = {"user": "int64", "history": "int64"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.user1, self.user2 = nn.Linear(16, 20), nn.Linear(20, 10)
        self.item1, self.norm, self.item2 = nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 10)
        self.gain, self.rating = nn.Parameter(torch.tensor(1.0)), nn.Bilinear(10, 10, 1)

    def forward(self, user: Tensor, history: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        left = torch.cat([self.users(user), self.items(history).mean(1)], 1)
        left = self.user2(torch.relu(self.user1(left)))
        right = self.item2(torch.relu(self.norm(self.item1(item))))
        cosine = functional.cosine_similarity(left, right, dim=1, eps=1e-6) * self.gain.exp()
        return cosine.unsqueeze(1), torch.sigmoid(self.rating(left, right))


class Fusion(nn.Module):
    """Motion asks a picture's patches by cross-attention, gated by a table of the device's kinds; two tasks."""

    input_shape = {"motion": (6, 16), "frame": (3, 8, 8), "kind": ()}  # noqa: RUF012
    input_dtype = {"frame": "uint8", "kind": "int64"}  # noqa: RUF012

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.moves, self.sees = nn.Conv1d(6, width, 5, 2, 2), nn.Conv2d(3, width, 4, 2)
        self.ask, self.norm = nn.MultiheadAttention(width, 3, batch_first=True), nn.LayerNorm(width)
        self.kinds, self.gate = nn.Embedding(20, width), nn.Linear(2 * width, width)
        self.what, self.where = nn.Linear(width, 5), nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, motion: Tensor, frame: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        motion_features = torch.relu(self.moves(motion)).transpose(1, 2)
        frame_features = torch.relu(self.sees(frame.to(self.sees.weight.dtype) / 255)).flatten(2).transpose(1, 2)
        both = self.norm(
            motion_features + self.ask(motion_features, frame_features, frame_features, need_weights=False)[0]
        ).mean(1)
        gate = torch.sigmoid(self.gate(torch.cat([both, self.kinds(kind)], 1)))
        joint = gate * both + (1 - gate) * frame_features.mean(1)
        return self.what(joint), self.where(joint)
