"""What a simulated fleet takes of memory, disk and time as it grows: `python benchmarks/simulation_memory.py`.

Every case runs in a process of its own, which reports its peak memory. The samples of a device are made again whenever
it trains (1,000 noisy digits, 0.26 MB): nobody could hold those, the models and the updates of thousands.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from synthetic_nets import setting, write

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


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int, participation: float, folder: Path) -> dict[str, Any]:
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
    before = peak()
    began = time.process_time()
    simulation = Simulation(
        Experiment("memory", job, model, devices, (held.x_test, held.y_test)),
        BlobStore(folder / "blobs", durable=False),
        folder=folder,
    )
    spent = {"save": 0.0}
    save = simulation._save

    def timed() -> None:
        start = time.process_time()
        save()
        spent["save"] += time.process_time() - start

    simulation._save = timed  # type: ignore[method-assign]
    started: list[float] = []  # after all devices were planned for, and the first has trained
    simulation.run(lambda _: None if started else started.append(time.process_time()))
    seconds = time.process_time() - started[0]
    trainings = sum(len(row["devices"]) for row in simulation.state.history)
    return {
        "devices": count,
        "participation": participation,
        "trainings": trainings,
        "before_mb": before,
        "peak_mb": peak(),
        "start_s": started[0] - began,
        "run_s": seconds,
        "ms_per_training": 1e3 * seconds / (trainings - 1),
        "saving": spent["save"] / seconds,
        "state_mb": (folder / "simulation.json").stat().st_size / 1e6,
        "rounds_mb": (folder / "rounds.jsonl").stat().st_size / 1e6,
        "blobs_mb": sum(p.stat().st_size for p in (folder / "blobs").rglob("*") if p.is_file()) / 1e6,
    }


def alone(count: int, participation: float) -> dict[str, Any]:
    """The same in a fresh process."""
    words = [sys.executable, __file__, str(count), str(participation)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def page(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    first = rows[0]
    heading = (
        f"{about['date']}, {about['cpu']}, {about['cores']} cores (one used; load {about['load']} from others), "
        f"Python {about['python']}, numpy {about['numpy']}. `OMP_NUM_THREADS=1 python benchmarks/simulation_memory.py`"
    )
    explained = (
        f"{ROUNDS} rounds of {STEPS} steps of a net of 95 k parameters, widths planned per device, three kinds of "
        f"boards; a device has {SAMPLES:,} samples (0.26 MB), which are read when it trains. Peak memory is the "
        f"process's, with {first['before_mb']:.0f} MB of libraries before the simulation begins. *held* is what "
        "samples and one whole model per device would take in memory. Times are CPU time; *start*: until the first "
        "device has trained, planning each one's widths included; *saving*: share of the rest that saving the state "
        "takes."
    )
    table = [
        "| devices | asked per round | peak MB | held, MB | start s | ms per training | saving | state MB | blobs MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        held = r["devices"] * (SAMPLES * 256 + 95_000 * 4) / 1e6
        table.append(
            f"| {r['devices']:,} | {r['trainings'] // ROUNDS} | {r['peak_mb']:.0f} | {held:,.0f} | {r['start_s']:.1f} "
            f"| {r['ms_per_training']:.0f} | {r['saving']:.1%} | {r['state_mb']:.2f} | {r['blobs_mb']:.1f} |"
        )
    large = next(r for r in rows if (r["devices"], r["participation"]) == (1000, 0.05))
    more = large["peak_mb"] - first["peak_mb"]
    closing = (
        f"From 50 to 1,000 devices at as many trainings a round the peak grows by {more:.0f} MB, "
        f"{1024 * more / 950:.0f} KiB per device: its plan and what the coordinator knows of it, several times while "
        "the state is written as JSON."
    )
    return "\n\n".join(["# Memory of a simulation", heading, explained, "\n".join(table), closing])


def main() -> None:
    if len(sys.argv) > 1:
        with TemporaryDirectory() as folder:
            print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]), Path(folder))))
        return
    rows = [alone(*case) for case in CASES]
    about = setting("onnxruntime")
    write("simulation_memory", {"setting": about, "rows": rows}, page(rows, about) + "\n")


if __name__ == "__main__":
    main()
