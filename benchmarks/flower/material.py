"""What both sides read: a model, its training graph, and every client's samples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from benchmarks.swarm.job import small_cnn
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune_export.importing import import_onnx
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.digits import CLASSES, deal, write_hand

ALPHA = 5.0
"""Concentration of the clients' shares of each digit: mild skew, so that even a hundred clients get samples."""

SEED = 0

FLEET = """\
[job]
name = "side-by-side"
seed = {seed}
rounds = {rounds}
devices = {devices}
strategy = "plain"
scorer = "ordered"
density = 1.0
deadline_s = {deadline_s}

[job.recipe]
epochs = {epochs}
batch_size = {batch_size}
lr = {lr}
momentum = {momentum}
evaluate_every = {rounds}

[model]
path = "model.onnx"

[evaluation]
data = "evaluation.npz"

[server]
broker = "mqtt://127.0.0.1:{port}"
state = "state"
max_devices = {clients}
"""


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        clients: How many there are.
        rounds: How many are trained.
        epochs: Passes through a client's samples in a round.
        present: Clients that must be there when a round begins; Flower waits for all before the first.
        deadline_s: Seconds after which a round continues without those whose updates are missing.
    """

    clients: int
    rounds: int = 10
    epochs: int = 5
    present: int = 0
    deadline_s: float = 3600.0

    @property
    def names(self) -> list[str]:
        """The clients' names."""
        return [f"client-{i:03}" for i in range(self.clients)]

    @property
    def recipe(self) -> Recipe:
        """Local training, on both sides."""
        return Recipe(epochs=self.epochs, batch_size=32, lr=0.05, momentum=0.9, evaluate_every=self.rounds)


def write_material(folder: Path, job: Job) -> None:
    """Write the files of a job into a new folder."""
    folder.mkdir(parents=True)
    raw = small_cnn()
    model = import_onnx(raw, "side-by-side")
    hands = deal(job.names, seed=SEED, alpha=ALPHA)
    (folder / "model.onnx").write_bytes(raw)
    (folder / "inference.onnx").write_bytes(_open(raw))
    (folder / "training.onnx").write_bytes(training_graph(model, job.recipe.features).to_bytes())
    (folder / "weights.safetensors").write_bytes(tensorfile.encode(model.tensors))
    np.savez(folder / "evaluation.npz", x=hands.x, y=hands.y)
    for name in job.names:
        write_hand(folder / f"{name}.npz", hands.devices[name])
    setting = {"seed": SEED, "recipe": job.recipe.to_dict(), "classes": CLASSES, "input": "x"}
    (folder / "setting.json").write_text(json.dumps(setting))


def write_fleet(folder: Path, job: Job, port: int) -> Path:
    """Write fedprune's `fleet.toml`, and return its path."""
    recipe, path = job.recipe, folder / "fleet.toml"
    path.write_text(
        FLEET.format(
            seed=SEED,
            rounds=job.rounds,
            devices=job.present or job.clients,
            clients=job.clients,
            deadline_s=job.deadline_s,
            epochs=recipe.epochs,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            momentum=recipe.momentum,
            port=port,
        )
    )
    return path


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights alone, as float32."""
    return sum(v.nbytes for v in tensorfile.decode((folder / "weights.safetensors").read_bytes()).values())


def _open(raw: bytes) -> bytes:
    """The same model, whose weights may be given as inputs, too."""
    model = onnx.load_from_string(raw)
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    opened: bytes = model.SerializeToString()
    return opened
