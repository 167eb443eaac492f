"""Rounds per minute of simulated FedAvg next to a torch loop's and Flower's: `python -m benchmarks.simulation`.

Flower takes part with `--flower PYTHON`, the interpreter of an environment with `flwr[simulation]` and torch. The sides
run in turns, each started afresh: fedprune and Flower train in a process for each core, the torch loop is one process
with its fastest number of threads. `--turns 1 --rounds 2` tries all of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, parser, ratio, run_cases
from benchmarks.simulation.material import write_material
from benchmarks.simulation.tasks import TASKS, Task

OURS, LOOP, FLOWER = "fedprune", "torch loop", "Flower"
MODULES = {OURS: "ours", LOOP: "torch_loop", FLOWER: "flower_app"}

TURNS = 2
_TIMEOUT_S = 600.0

# Largest distance of a side's model after the first round from the torch loop's, as a share of the distance that the
# loop's model has when it trains on other batches. Later rounds would tell less: models that train well draw closer.
_MAX_APART = 0.1


class SideError(Exception):
    """A side failed, or trained something else than the torch loop."""


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--flower", type=Path, metavar="PYTHON", help="an interpreter with flwr[simulation] and torch")
    command.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"default: {TURNS}")
    command.add_argument("--rounds", type=int, metavar="N", help="at least 2; default: each net's own number")
    options = command.parse_args()
    pythons = {OURS: Path(sys.executable), LOOP: Path(sys.executable)}
    if options.flower is None:
        print("Flower is left out: --flower names the interpreter of its environment", file=sys.stderr)
    else:
        pythons[FLOWER] = options.flower.absolute()
    versions = _flower_versions(options.flower)

    def run(net: str) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            rounds = options.rounds or TASKS[net].rounds
            return {**measure(TASKS[net], Path(folder) / net, pythons, options.turns, rounds), "made": versions}

    cases = [{"net": net} for net in TASKS]
    run_cases("simulation", None, cases, run, "onnxruntime", "torch", options=options, ratios=_means)


def measure(task: Task, folder: Path, pythons: Mapping[str, Path], turns: int, rounds: int) -> dict[str, Any]:
    """The numbers of a task: of each side, and ratios within a turn."""
    write_material(folder, task, rounds)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for turn in range(turns):
        # To and fro, so that what a side leaves behind, such as a warm processor, meets each of the others.
        for side in list(pythons)[:: -1 if turn % 2 else 1]:
            out = folder / f"{MODULES[side]}-{turn}.json"
            runs[side].append(_run(pythons[side], MODULES[side], folder, rounds, task.devices, out))
    row: dict[str, Any] = {"devices": task.devices, "samples": task.samples, "turns": turns, "rounds": rounds}
    loop = folder / f"{MODULES[LOOP]}-0"
    row["other_apart"] = other_apart = _apart(loop.with_suffix(".other.npz"), loop)
    for side, side_runs in runs.items():
        apart = _apart(folder / f"{MODULES[side]}-0.npz", loop)
        if not apart <= _MAX_APART * other_apart:
            raise SideError(
                f"the model of {side} is {apart:.3g} away from that of the torch loop after the first "
                f"round; on other batches the loop itself is {other_apart:.3g} away"
            )
        row[MODULES[side]] = {
            **{name: statistics.median(run[name] for run in side_runs) for name in ("first_s", "per_minute", "cpu_ms")},
            "threads": [run["threads"] for run in side_runs],
            "accuracy": side_runs[0]["accuracies"][-1],
            "apart": apart,
        }
    for side in (LOOP, FLOWER):
        if side in runs:
            row["ratio_" + MODULES[side]] = ratio(*([run["per_minute"] for run in runs[s]] for s in (OURS, side)))
            row["cpu_ratio_" + MODULES[side]] = ratio(*([run["cpu_ms"] for run in runs[s]] for s in (side, OURS)))
    return row


def _run(python: Path, module: str, folder: Path, rounds: int, devices: int, out: Path) -> dict[str, Any]:
    """One side's rounds in a process of its own."""
    began, log = time.time(), out.with_suffix(".log")
    command = [python, "-m", f"benchmarks.simulation.{module}", folder, str(rounds), out]
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), stdout=file, stderr=file, timeout=_TIMEOUT_S, check=False
        )  # fmt: skip
    if done.returncode or not out.exists():
        raise SideError(f"{module} failed:\n{log.read_text()[-3000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    # The first round has the start in it: processes, graphs and allocations.
    stamps, cpu_s, later = result["stamps"], result["cpu_s"], rounds - 1
    return {
        **result,
        "first_s": stamps[0] - began - result.get("tried_s", 0.0),
        "per_minute": 60 * later / (stamps[-1] - stamps[0]),
        "cpu_ms": 1000 * (cpu_s[-1] - cpu_s[0]) / later / devices,
    }


def _environment() -> dict[str, str]:
    """Without limits on threads, which each side sets itself."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _apart(path: Path, loop: Path) -> float:
    """The distance of a model from the torch loop's, as a share of how far that has moved from the first weights."""
    with np.load(path) as a, np.load(loop.with_suffix(".npz")) as b, np.load(loop.with_suffix(".start.npz")) as start:
        if a.keys() ^ b.keys():
            raise SideError(f"models with other tensors: {sorted(a.keys() ^ b.keys())}")
        apart, moved = (sum(float(np.sum((x[n] - b[n]) ** 2.0)) for n in b) for x in (a, start))
        return (apart / moved) ** 0.5


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric means of the ratios."""
    names = ("ratio_torch_loop", "ratio_flower_app")
    return {n: statistics.geometric_mean(row[n] for row in rows) for n in names if all(n in row for row in rows)}


def _flower_versions(python: Path | None) -> dict[str, str]:
    if python is None:
        return {"flwr": "left out", "ray": "left out"}
    code = "from importlib.metadata import version; print(version('flwr'), version('ray'))"
    flwr, ray = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return {"flwr": flwr, "ray": ray}


if __name__ == "__main__":
    main()
