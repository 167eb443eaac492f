"""Lower precision beside float32: `FEDPRUNE_DATA=... python benchmarks/precision.py`.

A ResNet-20 is trained on CIFAR-10 with torch, for minutes rather than to its best, and lowered as a board does it: by
graphs alone, with ranges measured on training samples. Then every precision predicts the test samples, and latencies
are measured in turn, so that neighbours on the machine hit all alike.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

Array = npt.NDArray[Any]

FOLDER = Path("build/precision")
BATCHES = (1, 32)
TURNS = 200
EPOCHS = 9
BATCH = 128
RATE = 0.4


def data() -> dict[str, Array]:
    """CIFAR-10 as a board has it: channels first, scaled to about one."""
    with np.load(Path(os.environ["FEDPRUNE_DATA"]) / "cifar10.npz") as file:
        out = {n: file[n] for n in ("x_train", "y_train", "x_test", "y_test")}
    for name in ("x_train", "x_test"):
        x = out[name].transpose(0, 3, 1, 2).astype(np.float32) / 255
        out[name] = np.ascontiguousarray((x - 0.5) / 0.25)
    return out


def train(samples: dict[str, Array], epochs: int) -> Any:
    """A ResNet-20 with a one-cycle schedule, flips and shifts, in bfloat16 where that is faster."""
    import torch
    from torch.nn.functional import cross_entropy, pad

    from nets import ResNet20

    torch.manual_seed(0)
    net = ResNet20().train().to(memory_format=torch.channels_last)
    x, y = torch.from_numpy(samples["x_train"]), torch.from_numpy(samples["y_train"].astype(np.int64))
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": [p for p in net.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    per_epoch = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * per_epoch, pct_start=0.25)
    for epoch in range(epochs):
        began, total = time.monotonic(), 0.0
        order = torch.randperm(len(x))
        for rows in order[: per_epoch * BATCH].split(BATCH):
            part = pad(x[rows], (4, 4, 4, 4))
            top, left = (int(v) for v in torch.randint(0, 9, (2,)))
            part = part[:, :, top : top + 32, left : left + 32]
            flips = torch.rand(len(part)) < 0.5
            part = torch.where(flips[:, None, None, None], part.flip(3), part)
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(net(part.contiguous(memory_format=torch.channels_last)).float(), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return net.eval().to(memory_format=torch.contiguous_format)


def trained(samples: dict[str, Array], epochs: int) -> Any:
    """The trained net; a later run takes what an earlier one has trained."""
    import torch

    from nets import ResNet20

    path = FOLDER / f"resnet20-{epochs}.pt"
    if not path.exists():
        net = train(samples, epochs)
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net = ResNet20()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()
