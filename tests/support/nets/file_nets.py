"""Small torch networks for what boards read from files: pictures, recordings, texts, time series."""

import torch
from torch import nn

from support.nets.small_nets import randomise_norms


class _Net(nn.Sequential):
    def __init__(self, input_shape: tuple[int, ...], *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.input_shape = input_shape


def _make_seeded(make: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise_norms(make())  # type: ignore[operator]


def autoencoder() -> nn.Module:
    """Pictures of 96 x 96 through an eighth of their numbers."""
    return _make_seeded(lambda: _Net((3, 96, 96), nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 8, 8)))


def listener() -> nn.Module:
    """Two classes of recordings of a second."""
    layers = nn.Conv1d(1, 8, 64, 16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)
    return _make_seeded(lambda: _Net((1, 16_000), *layers))


def painter() -> nn.Module:
    """Three classes for each pixel of 16 x 12."""
    return _make_seeded(lambda: _Net((3, 16, 12), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)))


def finder() -> nn.Module:
    """One box in 16 x 12 pixels: its class's logit, centre and size."""
    return _make_seeded(lambda: _Net((3, 16, 12), nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)))


def box_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared distance from the boxes that there are."""
    return ((labels[:, :, 0] >= 0).to(outputs.dtype) * ((outputs[:, None, 1:] - labels[:, :, 1:]) ** 2).sum(2)).sum(1)


box_loss.target_shape = (2, 5)  # type: ignore[attr-defined]


def forecaster() -> nn.Module:
    """The next row of two columns after sixteen."""
    return _make_seeded(lambda: _Net((2, 16), nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)))


def seer() -> nn.Module:
    """The next row of two columns after two thousand."""
    return _make_seeded(lambda: _Net((2, 2000), nn.Conv1d(2, 8, 20, 20), nn.ReLU(), nn.Flatten(), nn.Linear(800, 2)))


class _Gathered(nn.Module):
    """Two classes of recordings of up to a second, by the mean over their own places."""

    input_shape = (1, "400:16000")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 8, 16, 16), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        there = mask[:, None, ::16]
        out: torch.Tensor = self.head((torch.relu(self.conv(x)) * there).sum(2) / there.sum(2))
        return out


class _Tagger(nn.Module):
    """One of three classes for each of up to 1,000 tokens."""

    input_shape = ("1:1000",)
    input_dtype = "int64"

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.words(x)).transpose(1, 2)
        return out


class _Pair(nn.Module):
    """Two classes of a sound and a picture."""

    input_shape = {"sound": (1, 8000), "view": (3, 32, 32)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.hear, self.see, self.head = nn.Conv1d(1, 4, 64, 64), nn.Conv2d(3, 4, 8, 8), nn.Linear(8, 2)

    def forward(self, sound: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        both = torch.relu(self.hear(sound)).mean(2), torch.relu(self.see(view)).mean((2, 3))
        out: torch.Tensor = self.head(torch.cat(both, 1))
        return out


def gathered() -> nn.Module:
    return _make_seeded(_Gathered)


def tagger() -> nn.Module:
    return _make_seeded(_Tagger)


def pair() -> nn.Module:
    return _make_seeded(_Pair)
