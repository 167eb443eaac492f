"""The tutorials' fleet on unequal links: `fedprune` next to the two ways in which FedAvg keeps to them.

    python -m benchmarks.tutorial_fleet

FedAvg trains the same width everywhere: either what the poorest link can carry, or the whole model on the boards whose
links carry that. Both also get as many bytes as `fedprune`. Every seed deals the digits out again and draws other
batches. Writes `benchmarks/results/tutorial_fleet.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprune_server.simulation.digits import deal, digits_model, write_hand

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "tutorial_fleet.md"
BOARDS = {
    "attic": ("raspberry-pi-zero-2w", 40_000),
    "yard": ("raspberry-pi-4b", 150_000),
    "dock": ("jetson-orin-nano", 1_000_000),
}
"""Each board's hardware profile, and the bytes that its link carries in a round."""


@dataclass(frozen=True)
class Way:
    """A way of training the fleet.

    Attributes:
        title: What it is.
        strategy: The strategy's name.
        rounds: Rounds.
        density: The share of channels that every board trains; None for what the strategy plans.
        boards: The boards that take part.
    """

    title: str
    strategy: str
    rounds: int
    density: float | None = None
    boards: tuple[str, ...] = tuple(BOARDS)


WAYS = (
    Way("`fedprune`, 12 rounds", "fedprune", 12),
    Way("FedAvg at density 0.17 on all boards, 12 rounds", "fedavg", 12, 0.17),
    Way("FedAvg at density 0.17 on all boards, 130 rounds", "fedavg", 130, 0.17),
    Way("FedAvg with the whole model on the dock alone, 15 rounds", "fedavg", 15, None, ("dock",)),
)


def main() -> None:
    """Run all ways with all seeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="default: 4")
    seeds = range(parser.parse_args().seeds)
    found: dict[Way, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), seed)
            for way in WAYS:
                found[way].append(run(Path(folder), way, seed))
                print(seed, way.title, found[way][-1], file=sys.stderr, flush=True)
    lines = [
        "# The tutorials' fleet on unequal links",
        "",
        "Global accuracy on the server's samples, the mean of the last five rounds, by seed, and payload bytes of all",
        "boards in both directions. Written by `python -m benchmarks.tutorial_fleet`.",
        "",
        f"| | MB | {' | '.join(f'seed {s}' for s in seeds)} | mean |",
        f"| --- | --- |{' --- |' * (len(seeds) + 1)}",
    ]
    for way, results in found.items():
        shares = [accuracy for accuracy, _ in results]
        cells = " | ".join(f"{a:.1%}" for a in (*shares, float(np.mean(shares))))
        lines.append(f"| {way.title} | {np.mean([mb for _, mb in results]):.1f} | {cells} |")
    RESULT.write_text("\n".join(lines) + "\n")


def prepare(folder: Path, seed: int) -> None:
    """Deal the digits out, and write the boards' profiles."""
    hands = deal(tuple(BOARDS), seed=seed)
    (folder / "model.onnx").write_bytes(digits_model())
    np.savez(folder / "server.npz", x=hands.x, y=hands.y)
    np.savez(folder / "calibration.npz", x=hands.calibration)
    for board, data in hands.devices.items():
        write_hand(folder / f"{board}.npz", data)
        like, limit = BOARDS[board]
        text = (ROOT / "hardware_profiles" / f"{like}.toml").read_text()
        text = re.sub(r"(?m)^name = .*", f'name = "{board}"', text, count=1)
        text = re.sub(r"(?m)^bytes_per_round = .*", f"bytes_per_round = {limit}", text, count=1)
        (folder / f"{board}.toml").write_text(text)


def run(folder: Path, way: Way, seed: int) -> tuple[float, float]:
    """Global accuracy at the end, and megabytes."""
    devices = "".join(f'[[devices]]\nname = "{b}"\nprofile = "{b}.toml"\ndata = "{b}.npz"\n' for b in way.boards)
    density = "" if way.density is None else f"density = {way.density}\n"
    (folder / "fleet.toml").write_text(
        f'[job]\nname = "digits"\nrounds = {way.rounds}\ndevices = {len(way.boards)}\n{density}'
        '[job.recipe]\nepochs = 2\nlr = 0.03\n[model]\npath = "model.onnx"\n[evaluation]\ndata = "server.npz"\n'
        f'[calibration]\ndata = "calibration.npz"\n{devices}'
    )
    out = folder / f"{WAYS.index(way)}"
    command = [Path(sys.executable).with_name("fedprune-simulate"), "--config", folder / "fleet.toml"]
    options = ["--strategy", way.strategy, "--seed", str(seed), "--out", out]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rounds = json.loads((out / "metrics.json").read_bytes())["rounds"]
    return float(np.mean([r["accuracy"] for r in rounds[-5:]])), (rounds[-1]["down"] + rounds[-1]["up"]) / 1e6


if __name__ == "__main__":
    main()
