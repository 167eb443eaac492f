"""Train the transformer on CIFAR-100 with plain torch, on the server's machine: writes pretrained.pt.

    python pretrain.py

The boards' classes (CIFAR-10) are none of CIFAR-100's. It stands for weights that you have from elsewhere.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch.nn import functional
from vit import WEIGHTS, SmallViT

from fedprune.core.errors import FedpruneError
from fedprune_server.simulation.datasets.preparation import Preparation
from fedprune_server.simulation.datasets.source import read_samples

WHERE = "Write the binary versions of https://www.cs.toronto.edu/~kriz/cifar.html by ../to_npz.py"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the transformer on CIFAR-100.")
    parser.add_argument("--epochs", type=int, default=6)
    epochs = parser.parse_args().epochs
    try:
        samples = read_samples("cifar100.npz")
    except FedpruneError as error:
        sys.exit(f"{error}\n{WHERE} as cifar100.npz and cifar10.npz here.")
    rows = (~samples.is_test).nonzero()[0]
    x = torch.from_numpy(Preparation()(samples.take(rows)))  # float32 [n, 3, 32, 32] from 0 to 1, as boards get them
    y = torch.from_numpy(samples.labels[rows])
    torch.manual_seed(0)
    model = SmallViT(samples.classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = -(-len(y) // 128) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        right = 0
        for batch in torch.randperm(len(y)).split(128):
            images = x[batch].flip(3) if torch.rand(()) < 0.5 else x[batch]
            logits = model(images)
            loss = functional.cross_entropy(logits, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == y[batch]).sum())
        print(f"epoch {epoch + 1}: {right / len(y):.1%} right while training", flush=True)
    torch.save(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
