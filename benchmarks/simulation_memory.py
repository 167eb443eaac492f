"""What a simulated fleet takes of memory, disk and time as it grows.

    OMP_NUM_THREADS=1 python -m benchmarks.simulation_memory

Every case runs in a process of its own, which reports its peak memory. The samples of a device are made again whenever
it trains (1,000 noisy digits, 0.26 MB): nobody could hold those, the models and the updates of thousands.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import peak_bytes, run_cases
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.rng import keyed
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import StoredData, VirtualDevice
from fedprune_server.simulation.simulation import Simulation

CASES = ((50, 1.0), (250, 0.2), (1000, 0.05), (1000, 0.01), (4000, 0.0025))
"""Devices and participation: 50 trainings a round, or 10."""

ROUNDS = 10
SAMPLES = 1000
STEPS = 4
KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")


def samples(name: str) -> LocalData:
    """A device's own samples."""
    chance = keyed(0, name)
    y = chance.integers(0, 10, SAMPLES + 100)
    x = chance.standard_normal((len(y), 1, 8, 8), np.float32)
    x[:, 0, y % 8, y // 8] += 3
    return LocalData(x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:])


def measure(devices: int, participation: float) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return simulated(devices, participation, Path(folder))


def simulated(count: int, participation: float, folder: Path) -> dict[str, Any]:
    model = import_onnx(digits_model(), "digits-net")
    boards = [find(kind) for kind in KINDS]
    names = [f"board-{i:04}" for i in range(count)]
    devices = [
        VirtualDevice(n, boards[i % len(boards)], StoredData(SAMPLES, n, lambda n=n: samples(n)))  # type: ignore[misc]
        for i, n in enumerate(names)
    ]
    job = Job(
        rounds=ROUNDS,
        devices=count,
        participation=participation,
        byte_budget=700_000,
        recipe=Recipe(max_steps=STEPS),
    )
    held = samples("evaluation")
    before = peak_bytes()
    began = time.process_time()
    simulation = Simulation(
        Experiment("memory", job, model, devices, (held.x_test, held.y_test)),
        BlobStore(folder / "blobs", durable=False),
        folder=folder,
    )
    started: list[float] = []  # after all devices were planned for, and the first has trained
    simulation.run(lambda _: None if started else started.append(time.process_time()))
    seconds = time.process_time() - started[0]
    trainings = sum(len(row["devices"]) for row in simulation.state.history)
    return {
        "trainings": trainings,
        "before_mb": before / 2**20,
        "peak_mb": peak_bytes() / 2**20,
        "start_s": started[0] - began,
        "run_s": seconds,
        "ms_per_training": 1e3 * seconds / (trainings - 1),
        "state_mb": (folder / "simulation.json").stat().st_size / 1e6,
        "rounds_mb": (folder / "rounds.jsonl").stat().st_size / 1e6,
        "blobs_mb": sum(p.stat().st_size for p in (folder / "blobs").rglob("*") if p.is_file()) / 1e6,
    }


if __name__ == "__main__":
    wanted = [{"devices": devices, "participation": participation} for devices, participation in CASES]
    run_cases("simulation_memory", __doc__, wanted, measure, "onnxruntime", fresh=True)
