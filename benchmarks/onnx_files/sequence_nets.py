"""Small nets of series, words, sounds, tables, points and graphs, as `picture_nets` has them of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (as torch's own pages name it)


class Recurrent(nn.Module):
    """LSTM or GRU and a linear layer: of the last step, of the last state, or of every step."""

    def __init__(self, kind: str = "LSTM", read: str = "step", *, first: bool = True, **options: Any) -> None:
        super().__init__()
        options = {"hidden_size": 12, **options}
        self.cell, self.read, self.first = getattr(nn, kind)(6, batch_first=first, **options), read, first
        width = options.get("proj_size") or options["hidden_size"]
        both = 2 if options.get("bidirectional") else 1
        self.end = nn.Linear(width if read == "state" else width * both, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, state = self.cell(x)
        if self.read == "steps":
            return self.end(steps)
        if self.read == "state":
            return self.end((state[0] if isinstance(state, tuple) else state)[-1])
        return self.end(steps[:, -1] if self.first else steps[-1])


class Tcn(nn.Module):
    """Causal dilated convolutions, whose last padding is cut off (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4 if d == 1 else 16, 16, 3, padding=2 * d, dilation=d) for d in (1, 2)])
        self.skip, self.end = nn.Conv1d(4, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        for d, layer in zip((1, 2), self.layers, strict=True):
            skip = x = F.relu(skip + layer(x)[:, :, : -2 * d])
        return self.end(x[:, :, -1])


class WaveNet(nn.Module):
    """Gated causal convolutions with residual and skip paths (van den Oord et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList([nn.Conv1d(16, 32, 2, dilation=d) for d in (1, 2, 4)])
        self.outs = nn.ModuleList([nn.Conv1d(16, 32, 1) for _ in range(3)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), torch.zeros(1).to(x)
        for gate, out, d in zip(self.gates, self.outs, (1, 2, 4), strict=True):
            a, b = gate(F.pad(x, (d, 0))).chunk(2, 1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).split(16, 1)
            x, total = x + residual, total + skip
        return self.end(total)


class Speech(nn.Module):
    """Whisper's encoder: two convolutions over a spectrogram, fixed sines as positions, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 16, 3, 2, 1)
        angles = torch.arange(12)[:, None] * torch.exp(-torch.arange(8) * 0.9)
        self.places = nn.Parameter(torch.cat([angles.sin(), angles.cos()], 1))
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.body, self.end = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(x)))).permute(0, 2, 1)
        return self.end(self.body(x + self.places).mean(1))


class Wav2Vec(nn.Module):
    """wav2vec 2.0's features of a waveform: a group norm per channel, layer norms over channels, weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 16, 10, 5, bias=False), nn.GroupNorm(16, 16)
        self.second, self.layer_norm = nn.Conv1d(16, 16, 3, 2, bias=False), nn.LayerNorm(16)
        place = nn.Conv1d(16, 16, 4, padding=2, groups=4)
        self.places, self.end = nn.utils.parametrizations.weight_norm(place, dim=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.norm(self.first(x)))))
        x = self.layer_norm(x.transpose(1, 2))
        x = x + F.gelu(self.places(x.transpose(1, 2))[:, :, :-1]).transpose(1, 2)
        return self.end(x.mean(1))


class Vae(nn.Module):
    """A variational autoencoder; it predicts from the mean, or samples with `noise`."""

    def __init__(self, *, noise: bool = False) -> None:
        super().__init__()
        self.noise, self.body = noise, nn.Sequential(nn.Linear(20, 16), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(16, 4), nn.Linear(16, 4)
        self.end = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 20))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        z = self.mean(x)
        if self.noise:
            z = z + torch.randn_like(z) * torch.exp(0.5 * self.log_variance(x))
        return self.end(z)


class Bags(nn.Module):
    """A mean of word embeddings (fastText's classifier)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.end = nn.EmbeddingBag(50, 16, mode="mean"), nn.Linear(16, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.end(torch.relu(self.bag(words)))


class TextCnn(nn.Module):
    """Convolutions of three widths over embeddings, the largest of each (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.convs, self.end = nn.ModuleList([nn.Conv1d(16, 8, k) for k in (2, 3, 4)]), nn.Linear(24, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).transpose(1, 2)
        return self.end(torch.cat([F.relu(c(x)).max(2).values for c in self.convs], 1))


class Tabular(nn.Module):
    """Columns of numbers beside embeddings of categories (wide and deep)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(size, 4) for size in (7, 5)])
        self.body = nn.Sequential(nn.Linear(5 + 8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.end = nn.Linear(16 + 5, 3)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        x = torch.cat([numbers, *(e(categories[:, i]) for i, e in enumerate(self.embed))], 1)
        return self.end(torch.cat([self.body(x), numbers], 1))


class PointNet(nn.Module):
    """A function of each point, the largest over points, and a function of that (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
        self.end = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, points: Tensor) -> Tensor:
        return self.end(self.points(points.transpose(1, 2)).amax(2))


class Conformer(nn.Module):
    """Half a feed-forward layer, attention, a gated depthwise convolution (Gulati et al. 2020); classes per step."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide, self.depthwise = nn.Conv1d(16, 32, 1), nn.Conv1d(16, 16, 5, padding=2, groups=16)
        self.batch_norm, self.end = nn.BatchNorm1d(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.feed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.wide(x.transpose(1, 2)), 1)
        x = x + F.silu(self.batch_norm(self.depthwise(y))).transpose(1, 2)
        return self.end(x).transpose(1, 2)


class Graphs(nn.Module):
    """A graph convolution with its adjacency as an input: Einsum over nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.end = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, adjacency: Tensor, nodes: Tensor) -> Tensor:
        x = torch.relu(torch.einsum("nij,njc->nic", adjacency, self.first(nodes)))
        return self.end(torch.relu(torch.einsum("nij,njc->nic", adjacency, self.second(x))).mean(1))
