"""The files that all sides read: the net, shares, batches, the server's samples and a `fleet.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation.tasks import BATCH_SIZE, LEARNING_RATE, MOMENTUM, Task, deal_samples, seeded_net
from fedprune.model.recipe import Recipe
from fedprune_device.data.batches import Batches
from fedprune_export.importing import export_torch

SEED = 0

FLEET = """\
[job]
name = "simulation"
seed = {seed}
rounds = {rounds}
devices = {devices}
strategy = "plain"
scorer = "ordered"
density = 1.0
deadline_s = 1_000_000

[job.recipe]
epochs = 1
batch_size = {batch_size}
lr = {lr}
momentum = {momentum}

[model]
path = "model.onnx"

[evaluation]
data = "server.npz"
"""

DEVICE = """
[[devices]]
name = "device-{number:02}"
profile = "raspberry-pi-4b"
data = "device-{number:02}.npz"
"""


def write_material(folder: Path, task: Task, rounds: int) -> None:
    """Write the files of a task into a folder. No device has test samples, so that none evaluates."""
    folder.mkdir(parents=True)
    (folder / "task").write_text(task.name)
    (folder / "model.onnx").write_bytes(export_torch(seeded_net(task), input_shape=task.shape))
    x, y = deal_samples(task)
    for number in range(task.devices):
        own = slice(number * task.samples, (number + 1) * task.samples)
        np.savez(folder / f"device-{number:02}.npz", x_train=x[own], y_train=y[own], x_test=x[:0], y_test=y[:0])
    served = slice(task.devices * task.samples, None)
    np.savez(folder / "server.npz", x=x[served], y=y[served])
    np.savez(folder / "batches.npz", **_batches(task, rounds))
    fleet = FLEET.format(
        seed=SEED, rounds=rounds, devices=task.devices, batch_size=BATCH_SIZE, lr=LEARNING_RATE, momentum=MOMENTUM
    )
    rows = "".join(DEVICE.format(number=number) for number in range(task.devices))
    (folder / "fleet.toml").write_text(fleet + rows)


def _batches(task: Task, rounds: int) -> dict[str, Any]:
    """By round and device the rows of each step, as a board draws them [steps, batch]."""
    drawn = Batches(task.samples, Recipe(batch_size=BATCH_SIZE, epochs=1), normalised=False)
    return {
        f"{round_}-{number}": np.stack([rows for _, rows in drawn.rows(round_, f"device-{number:02}", seed=SEED)])
        for round_ in range(1, rounds + 1)
        for number in range(task.devices)
    }
