"""What a device does in torch, for the loop and for Flower's clients: the same steps on the same batches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.simulation.tasks import LEARNING_RATE, MOMENTUM, TASKS, seeded_net

State = dict[str, torch.Tensor]


class Material:
    """The files of a folder, read once by each process: a net, shares, batches and the server's samples."""

    def __init__(self, folder: Path) -> None:
        self.task = TASKS[(folder / "task").read_text()]
        self.net = seeded_net(self.task)
        self._folder = folder
        with np.load(folder / "batches.npz") as batches:
            self._batches = {key: torch.from_numpy(value) for key, value in batches.items()}
        with np.load(folder / "server.npz") as server:
            self._x, self._y = torch.from_numpy(server["x"]), torch.from_numpy(server["y"])

    @cache  # noqa: B019 - there is one object in a process
    def share(self, device: int) -> tuple[torch.Tensor, torch.Tensor]:
        with np.load(self._folder / f"device-{device:02}.npz") as share:
            return torch.from_numpy(share["x_train"]), torch.from_numpy(share["y_train"])

    def train(self, state: State, device: int, round_: int) -> State:
        """A device's training from the global model; the result is overwritten by the next."""
        net = self.net
        net.load_state_dict(state)
        net.train()
        x, y = self.share(device)
        # Fused is the fastest of torch's ways to take this step on a processor.
        optimiser = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
        for rows in self._batches[f"{round_}-{device}"]:
            optimiser.zero_grad(set_to_none=True)
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
        return net.state_dict()

    @torch.no_grad()
    def accuracy(self, state: State) -> float:
        """Of the global model on the server's samples."""
        self.net.load_state_dict(state)
        self.net.eval()
        return float((self.net(self._x).argmax(1) == self._y).float().mean())


def save_state(path: Path, state: State) -> None:
    """Write a model for the comparison with the others."""
    arrays: dict[str, Any] = {n: v.numpy() for n, v in state.items() if not n.endswith("num_batches_tracked")}
    np.savez(path, **arrays)


def initial_state(net: nn.Module) -> State:
    return {name: value.clone() for name, value in net.state_dict().items()}
