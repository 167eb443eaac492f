"""Small torch networks for what boards read from files: pictures, recordings, time series."""

from __future__ import annotations

import torch
from torch import nn

from support.nets.small_nets import seeded


class _Net(nn.Sequential):
    def __init__(self, input_shape: tuple[int, ...], *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.input_shape = input_shape


def _seeded(make: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seeded(make())  # type: ignore[operator]


def autoencoder() -> nn.Module:
    """Pictures of 96 x 96 through an eighth of their numbers."""
    return _seeded(
        lambda: _Net((3, 96, 96), nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 8, 8)),
    )


def listener() -> nn.Module:
    """Two classes of recordings of a second."""
    parts = nn.Conv1d(1, 8, 64, 16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 2)
    return _seeded(lambda: _Net((1, 16_000), *parts))


def watcher() -> nn.Module:
    """Two classes of pictures of 16 x 12."""
    return _seeded(lambda: _Net((3, 16, 12), nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)))


def painter() -> nn.Module:
    """Three classes for each pixel of 16 x 12."""
    return _seeded(lambda: _Net((3, 16, 12), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)))


def finder() -> nn.Module:
    """One box in 16 x 12 pixels: its class's logit, centre and size."""
    return _seeded(lambda: _Net((3, 16, 12), nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)))


def box_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared distance from the boxes that there are."""
    there = (labels[:, :, 0] >= 0).to(outputs.dtype)
    far = ((outputs[:, None, 1:] - labels[:, :, 1:]) ** 2).sum(2)
    return (there * far).sum(1)


box_loss.target_shape = (2, 5)  # type: ignore[attr-defined]


def forecaster() -> nn.Module:
    """The next row of two columns after sixteen."""
    return _seeded(lambda: _Net((2, 16), nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)))
