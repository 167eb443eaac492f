"""Parts of an existing Flower app: a model, data, a training loop and an evaluation loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.digits import deal_digits

ALPHA = 5.0


class Net(nn.Module):
    """Three convolutions with batch normalisation, for 8×8 digits."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def load_data(partition: int, partitions: int) -> LocalData:
    """One node's samples: `x_train`, `y_train`, `x_test` and `y_test`."""
    names = [f"node-{i}" for i in range(partitions)]
    return deal_digits(names, alpha=ALPHA).devices[names[partition]]


def server_samples(partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """The server's own test data."""
    dealt = deal_digits([f"node-{i}" for i in range(partitions)], alpha=ALPHA)
    return dealt.x, dealt.y


def fit(net: nn.Module, data: LocalData, epochs: int = 5, lr: float = 0.05) -> int:
    """Train, and return the number of steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    x, y, steps = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train), 0
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(32):
            if len(rows) > 1:  # batch norm can't learn from a single sample
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
                steps += 1
    return steps


def accuracy(net: nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Share of samples whose class is found."""
    net.eval()
    with torch.no_grad():
        return float((net(torch.from_numpy(x)).argmax(1).numpy() == y).mean())
