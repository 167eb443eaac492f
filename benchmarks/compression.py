"""Codecs of what travels: what each costs in accuracy and saves in bytes.

    OMP_NUM_THREADS=1 python -m benchmarks.compression

A simulated fleet on real data, the demo's 8×8 digits. Every setting has the same devices, data, seeds and rounds;
server and boards run their own code.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import run_cases
from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find_profile
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import deal_digits, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

KIND = "raspberry-pi-4b"
SETTINGS = (
    ("none", "none"),
    ("int8", "none"),
    ("top-k:0.2", "none"),
    ("top-k:0.05", "none"),
    ("top-k:0.01", "none"),
    ("none", "int8"),
    ("int8", "int8"),
    ("int4", "int4"),
    ("top-k:0.05", "int8"),
)
"""Codecs of updates and of weights."""

SEEDS = 3


def digits(seed: int) -> tuple[Model, list[VirtualDevice], Any, Job]:
    """Six devices with the demo's digits."""
    names = [f"d{i}" for i in range(6)]
    data = deal_digits(names, seed=seed)
    devices = [VirtualDevice(n, find_profile(KIND), data.devices[n]) for n in names]
    recipe = Recipe(epochs=2, batch_size=16, lr=0.02)
    job = Job(name="digits", seed=seed, rounds=25, devices=6, density=0.75, recipe=recipe)
    return import_onnx(digits_model(), "digits"), devices, (data.x, data.y), job


def run(seed: int, update: str, weights: str) -> dict[str, Any]:
    """Accuracy by round, and bytes of updates and of weights that a device causes per round."""
    model, devices, evaluation, job = digits(seed)
    job = Job.from_dict({**job.to_dict(), "compression": update, "compression_down": weights})
    rows: list[tuple[int, int]] = []
    known: set[tuple[int, str]] = set()

    def note(run: Simulation) -> None:
        for device, task in run.state.tasks.items():
            if task.offer is not None and (run.state.round, device) not in known:
                known.add((run.state.round, device))
                sent = task.offer.get("coded") or task.offer["weights"]
                moved = task.offer.get("moved") or {"size": 0}
                rows.append((run.state.round, int(sent["size"]) + int(moved["size"])))

    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder) / "blobs", durable=False)
        simulation = Simulation(Experiment("compression", job, model, devices, evaluation), store)
        history = simulation.run(note)
    return {
        "accuracy": [r["metrics"]["accuracy"] for r in history],
        "counted": sum(p["progress"] == "folded" for r in history for p in r["devices"].values()),
        "up": statistics.mean(sizes[1] for notes in simulation.notes.values() for sizes in notes.spent.values()),
        "down": statistics.mean(size for _, size in rows),
        "down_later": statistics.mean(size for number, size in rows if number > 1),
    }


if __name__ == "__main__":
    wanted = [{"seed": seed, "update": up, "weights": down} for up, down in SETTINGS for seed in range(SEEDS)]
    run_cases("compression", __doc__, wanted, run, "onnxruntime")
