"""The tutorials' fleet on unequal links: `fedprune` next to the two ways in which FedAvg keeps to them.

    python -m benchmarks.tutorial_fleet

FedAvg trains the same width everywhere: what the poorest link can carry, in float32 or in int8, or the whole model on
the boards whose links carry that. All three also get as many bytes as `fedprune`. Every seed deals the digits out again
and draws other batches.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import run_cases
from fedprune_server.simulation.starter import STARTERS, write_starter


@dataclass(frozen=True)
class Way:
    """A way of training the fleet.

    Attributes:
        title: What it is.
        strategy: The strategy's name.
        rounds: Rounds.
        density: The share of channels that every board trains; None for what the strategy plans.
        boards: The boards that take part.
        codec: What updates and weights travel in.
    """

    title: str
    strategy: str
    rounds: int
    density: float | None = None
    boards: tuple[str, ...] = tuple(board.name for board in STARTERS)
    codec: str = "auto"


WAYS = (
    Way("`fedprune`, 12 rounds", "fedprune", 12),
    Way("FedAvg at density 0.17 on all boards, 12 rounds", "fedavg", 12, 0.17),
    Way("FedAvg at density 0.17 on all boards, 40 rounds", "fedavg", 40, 0.17),
    Way("FedAvg in int8 at density 0.31 on all boards, 52 rounds", "fedavg", 52, 0.31, codec="int8"),
    Way("FedAvg with the whole model on the dock alone, 5 rounds", "fedavg", 5, None, ("dock",)),
)


def run(folder: Path, way: Way, seed: int) -> tuple[float, float]:
    """Global accuracy at the end, and megabytes."""
    devices = "".join(
        f'[[devices]]\nname = "{b}"\nprofile = "profiles/{b}.toml"\ndata = "{b}.npz"\n' for b in way.boards
    )
    density = "" if way.density is None else f"density = {way.density}\n"
    codecs = f'compression = "{way.codec}"\ncompression_down = "{way.codec}"\n'
    (folder / "fleet.toml").write_text(
        f'[job]\nname = "digits"\nrounds = {way.rounds}\ndevices = {len(way.boards)}\n{density}{codecs}'
        '[job.recipe]\nepochs = 2\nlr = 0.03\n[model]\npath = "model.onnx"\n[evaluation]\ndata = "server.npz"\n'
        f'[calibration]\ndata = "calibration.npz"\n{devices}'
    )
    out = folder / f"{WAYS.index(way)}"
    command = [Path(sys.executable).with_name("fedprune-simulate"), "--config", folder / "fleet.toml"]
    options = ["--strategy", way.strategy, "--seed", str(seed), "--out", out]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rounds = json.loads((out / "metrics.json").read_bytes())["rounds"]
    accuracies = [r["metrics"]["accuracy"] for r in rounds[-5:]]
    return float(np.mean(accuracies)), (rounds[-1]["down"] + rounds[-1]["up"]) / 1e6


def measure(title: str, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_starter(Path(folder), STARTERS, seed)
        accuracy, megabytes = run(Path(folder), next(way for way in WAYS if way.title == title), seed)
    return {"accuracy": accuracy, "megabytes": megabytes}


if __name__ == "__main__":
    wanted = [{"title": way.title, "seed": seed} for seed in (0, 1) for way in WAYS]
    run_cases("tutorial_fleet", __doc__, wanted, measure, "onnxruntime")
