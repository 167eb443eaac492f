"""The nets, and each device's samples and batches, which are the same on all sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.step_nets import network

BATCH_SIZE = 32
LEARNING_RATE = 0.02
MOMENTUM = 0.9
CLASSES = 10
TEST_SAMPLES = 256


@dataclass(frozen=True)
class Task:
    """A net, and how many devices train it in how many rounds on how many samples, once through in every round.

    Rounds are as many as take a side some 5 to 25 s on two cores, and two at least: the first has the start in it.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    devices: int
    rounds: int
    samples: int = 128


class Lstm(nn.Module):
    """Nine channels of a motion sensor over 64 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(9, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Any) -> Any:
        """[N, 9, 64] to [N, classes]."""
        return self.head(self.rnn(x.permute(2, 0, 1))[0][-1])


def digits_net() -> nn.Module:
    """The demo's net: three convolutions with batch norm, 94,000 weights."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after == 64 else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


def perceptron() -> nn.Module:
    """McMahan's 2NN: 199,210 weights."""
    layers = (nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, CLASSES))
    return nn.Sequential(*layers)


TASKS = {
    task.name: task
    for task in (
        Task("digits", digits_net, (1, 8, 8), 20, 12),
        Task("2nn", perceptron, (784,), 20, 40),
        Task("lenet", lambda: network("lenet"), (1, 28, 28), 10, 8),
        Task("lstm", Lstm, (9, 64), 20, 12),
        Task("resnet20_bn", lambda: network("resnet20_bn"), (3, 32, 32), 4, 3),
    )
}


def seeded_net(task: Task) -> nn.Module:
    """The net with the weights that all sides begin with."""
    torch.manual_seed(0)
    return task.make()


def deal_samples(task: Task) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Samples and labels of all devices and, at the end, the server's: classes are noise around ten patterns."""
    rng = np.random.default_rng(0)
    count = task.devices * task.samples + TEST_SAMPLES
    patterns = rng.normal(size=(CLASSES, *task.shape)).astype(np.float32)
    y = rng.integers(CLASSES, size=count)
    noise = rng.normal(size=(count, *task.shape)).astype(np.float32)
    return (0.3 * patterns[y] + noise).astype(np.float32), y.astype(np.int64)
