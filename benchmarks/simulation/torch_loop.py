"""FedAvg as a loop in eager torch: `python -m benchmarks.simulation.torch_loop FOLDER ROUNDS OUT`.

One process; it takes as many threads as train a device fastest, which it tries in the first round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.simulation.local_training import Material, State, initial_state, save_state


def main(folder: Path, rounds: int, out: Path) -> None:
    material = Material(folder)
    task, state = material.task, initial_state(material.net)
    threads = fastest_threads(material, state)
    torch.set_num_threads(threads)
    stamps, accuracies = [], []
    for round_ in range(1, rounds + 1):
        total: State = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in state.items()}
        for device in range(task.devices):
            trained = material.train(state, device, round_)
            for name, value in trained.items():
                total[name].add_(value, alpha=task.samples)
        for name, value in state.items():
            value.copy_(total[name].div_(task.devices * task.samples))
        accuracies.append(material.accuracy(state))
        stamps.append(time.time())
    save_state(out.with_suffix(".npz"), state)
    out.write_text(json.dumps({"stamps": stamps, "accuracies": accuracies, "threads": threads}))


def fastest_threads(material: Material, state: State) -> int:
    """One thread or one for each core, whichever trains a device sooner."""
    seconds: dict[int, float] = {}
    for threads in (1, os.cpu_count() or 1) * 3:
        torch.set_num_threads(threads)
        began = time.perf_counter()
        material.train(state, 0, 1)
        took = time.perf_counter() - began
        seconds[threads] = min(took, seconds.get(threads, took))
    return min(seconds, key=lambda threads: seconds[threads])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
