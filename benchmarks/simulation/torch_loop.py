"""FedAvg as a loop in eager torch: `python -m benchmarks.simulation.torch_loop FOLDER ROUNDS OUT`.

One process, with one thread or one for each core, whichever trains a device sooner. It tries that before the first
round, and says how long the trial took. For the check of the others' models it leaves, beside its model after the first
round, the first weights and what another round's batches would have made of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.simulation.local_training import Material, State, initial_state, save_state
from benchmarks.simulation.stamps import Stamps


def main(folder: Path, rounds: int, out: Path) -> None:
    material = Material(folder)
    state = initial_state(material.net)
    start = {name: value.clone() for name, value in state.items()}
    began = time.perf_counter()
    threads = fastest_threads(material, state)
    torch.set_num_threads(threads)
    tried_s = time.perf_counter() - began
    stamps, accuracies = Stamps(), []
    for round_ in range(1, rounds + 1):
        train_round(material, state, round_)
        accuracies.append(material.accuracy(state))
        if round_ == 1:
            save_state(out.with_suffix(".npz"), state)
        stamps.add()
    save_state(out.with_suffix(".start.npz"), start)
    train_round(material, start, 2)
    save_state(out.with_suffix(".other.npz"), start)
    result = {**stamps.result(), "accuracies": accuracies, "threads": threads, "tried_s": tried_s}
    out.write_text(json.dumps(result))


def train_round(material: Material, state: State, round_: int) -> None:
    """Replace a model by the mean of what all devices make of it."""
    task = material.task
    total: State = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in state.items()}
    for device in range(task.devices):
        trained = material.train(state, device, round_)
        for name, value in trained.items():
            total[name].add_(value, alpha=task.samples)
    for name, value in state.items():
        value.copy_(total[name].div_(task.devices * task.samples))


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
