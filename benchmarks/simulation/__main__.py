"""Rounds per minute of simulated FedAvg next to a torch loop's and Flower's: `python -m benchmarks.simulation`.

Flower takes part with `--flower PYTHON`, the interpreter of an environment with `flwr[simulation]` and torch. The sides
run in turns, each in a process of its own, on all cores.
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

from benchmarks.harness import RESULTS, ROOT, parser, save, setting
from benchmarks.simulation.material import write_material
from benchmarks.simulation.tasks import TASKS, Task

OURS, LOOP, FLOWER = "fedprune", "torch loop", "Flower"
MODULES = {OURS: "ours", LOOP: "torch_loop", FLOWER: "flower_app"}

# The first round has the start in it: processes, graphs and allocations.
ROUNDS = 5
TURNS = 2
_TIMEOUT_S = 600.0

# Largest difference of a weight to the torch loop's, as a share of the largest weight of its tensor: sides that
# train on other batches or by another recipe are ten times as far apart after one round.
_MAX_APART = 0.02


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--flower", type=Path, metavar="PYTHON", help="an interpreter with flwr[simulation] and torch")
    command.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"default: {TURNS}")
    options = command.parse_args()
    only = dict(options.only).get("net")
    pythons = {OURS: Path(sys.executable), LOOP: Path(sys.executable)}
    if options.flower is None:
        print("Flower is left out: --flower names the interpreter of its environment", file=sys.stderr)
    else:
        pythons[FLOWER] = options.flower.absolute()
    out = options.out or RESULTS / "simulation.json"
    rows = [] if options.anew or not out.exists() else json.loads(out.read_text())["rows"]
    known = {**setting("onnxruntime", "torch"), **_flower_versions(options.flower)}
    for task in TASKS.values():
        if only in (None, task.name):
            with TemporaryDirectory() as folder:
                row = measure(task, Path(folder) / task.name, pythons, options.turns)
            print(row, file=sys.stderr, flush=True)
            rows = [row, *(other for other in rows if other["net"] != task.name)]
            rows.sort(key=lambda row: list(TASKS).index(row["net"]))
            # After each net, so that an interrupted run loses one; `--only net=NAME` measures it again.
            save(
                out, {"setting": known, "turns": options.turns, "rounds": ROUNDS, "rows": rows, "ratios": _means(rows)}
            )


def measure(task: Task, folder: Path, pythons: Mapping[str, Path], turns: int) -> dict[str, Any]:
    """The numbers of a task: of each side, and ratios within a turn."""
    write_material(folder, task, ROUNDS)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in pythons}
    for turn in range(turns):
        for side, python in pythons.items():
            runs[side].append(_run(python, MODULES[side], folder, folder / f"{MODULES[side]}-{turn}.json"))
    row: dict[str, Any] = {"net": task.name, "devices": task.devices, "samples": task.samples}
    reference = folder / f"{MODULES[LOOP]}-0.npz"
    for side, side_runs in runs.items():
        apart = _apart(folder / f"{MODULES[side]}-0.npz", reference)
        if not apart <= _MAX_APART:
            raise SystemExit(f"{task.name}: the model of {side} is {apart:.3g} away from that of the torch loop")
        row[MODULES[side]] = {
            "first_s": statistics.median(run["first_s"] for run in side_runs),
            "per_minute": statistics.median(run["per_minute"] for run in side_runs),
            "threads": [run["threads"] for run in side_runs],
            "accuracy": side_runs[0]["accuracies"][-1],
            "apart": apart,
        }
    for side in (LOOP, FLOWER):
        if side in runs:
            pairs = zip(runs[OURS], runs[side], strict=True)
            row["ratio_" + MODULES[side]] = statistics.median(a["per_minute"] / b["per_minute"] for a, b in pairs)
    return row


def _run(python: Path, module: str, folder: Path, out: Path) -> dict[str, Any]:
    """One side's rounds in a process of its own."""
    began, log = time.time(), out.with_suffix(".log")
    command = [python, "-m", f"benchmarks.simulation.{module}", folder, str(ROUNDS), out]
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), stdout=file, stderr=file, timeout=_TIMEOUT_S, check=False
        )  # fmt: skip
    if done.returncode or not out.exists():
        raise SystemExit(f"{module} failed:\n{log.read_text()[-3000:]}")
    result: dict[str, Any] = json.loads(out.read_text())
    stamps = result["stamps"]
    first, rate = stamps[0] - began, 60 * (len(stamps) - 1) / (stamps[-1] - stamps[0])
    return {**result, "first_s": first, "per_minute": rate}


def _environment() -> dict[str, str]:
    """Without limits on threads, which each side sets itself."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _apart(one: Path, other: Path) -> float:
    """The largest difference of two models' values, as a share of the largest of their tensor."""
    with np.load(one) as a, np.load(other) as b:
        if a.keys() ^ b.keys():
            raise SystemExit(f"models with other tensors: {sorted(a.keys() ^ b.keys())}")
        return max(float(np.abs(a[n] - b[n]).max() / max(np.abs(b[n]).max(), 1e-6)) for n in b)


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
