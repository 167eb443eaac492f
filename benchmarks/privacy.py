"""What differential privacy costs: accuracy against ε, for FedAvg and fedprune on the demo's digits.

    OMP_NUM_THREADS=1 python -m benchmarks.privacy [--fleet]

Simulated boards of the demo's kinds: the demo's six, by noise; with `--fleet` twenty, at ε of 2, 8, 32 and none, over
three seeds, whose records are `private_fleet.json`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, run_cases, save
from fedprune.blobs.blob_store import BlobStore
from fedprune.updates.privacy import SHARED, Privacy, epsilon
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.simulated_fleet import DEMO_BOARDS, demo_job, demo_reference_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

DELTA, CLIP = 1e-5, 1.0
STRATEGIES = ("fedavg", "fedprune")
LAST = 3
"""Rounds of which accuracies of the six boards are means."""

ROUNDS = 12
FLEET, FLEET_ROUNDS, EPOCHS = 20, 6, 2
SEEDS = (0, 1, 2)
EPSILONS = (2.0, 8.0, 32.0, None)


def simulated(strategy: str, privacy: Privacy, seed: int, boards: int, rounds: int) -> tuple[list[Any], Simulation]:
    """The metrics of every round of a fleet, and the simulation."""
    job = replace((demo_job if strategy == "fedprune" else demo_reference_job)(seed, rounds), privacy=privacy)
    if boards == FLEET:
        job = replace(job, devices=FLEET, recipe=replace(job.recipe, epochs=EPOCHS, evaluate_every=FLEET_ROUNDS))
    kinds = [DEMO_BOARDS[i % len(DEMO_BOARDS)] for i in range(boards)]
    names = [kind.name if boards == len(DEMO_BOARDS) else f"{kind.name}-{i}" for i, kind in enumerate(kinds)]
    data = deal(names, seed=seed)
    devices = [VirtualDevice(name, kind.profile(), data.devices[name]) for name, kind in zip(names, kinds, strict=True)]
    model = import_onnx(digits_model(), "digits-net")
    experiment = Experiment("privacy", job, model, devices, (data.x, data.y), data.calibration)
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(experiment, BlobStore(Path(folder), durable=False))
        return [row["metrics"] for row in simulation.run()], simulation


def six_cases() -> Iterator[dict[str, Any]]:
    for strategy in STRATEGIES:
        yield {"strategy": strategy, "clip": 0.0, "noise": "local", "multiplier": 0.0}
        yield {"strategy": strategy, "clip": CLIP, "noise": "local", "multiplier": 0.0}
        for noise, multipliers in (("local", (0.03, 0.1, 0.3)), ("shared", (0.1, 0.3, 1.0))):
            for multiplier in multipliers:
                yield {"strategy": strategy, "clip": CLIP, "noise": noise, "multiplier": multiplier}


def run_six(strategy: str, clip: float, noise: str, multiplier: float) -> dict[str, Any]:
    boards = 0 if noise == "local" else len(DEMO_BOARDS) - 1
    privacy = Privacy(clip, multiplier, noise, boards, DELTA) if clip else Privacy()
    rows, _ = simulated(strategy, privacy, 0, len(DEMO_BOARDS), ROUNDS)
    return {
        "epsilon": rows[-1].get("epsilon"),
        "accuracy": float(np.mean([row["accuracy"] for row in rows[-LAST:]])),
        "accuracies": [row["accuracy"] for row in rows],
        "epsilons": [row.get("epsilon") for row in rows],
    }


def noise_multiplier(target: float) -> float:
    """The noise multiplier at which every round may be released for a board to have cost ε at the end."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(FLEET_ROUNDS / middle**2, DELTA) > target else (low, middle)
    return high


@cache
def holders(strategy: str) -> int:
    """How many boards hold what the board holds that shares the least: found out in a round of hardly any noise."""
    trial = Privacy(CLIP, 0.01, SHARED, FLEET - 1, DELTA)
    state = simulated(strategy, trial, SEEDS[0], FLEET, 1)[1].state
    least = min(float(z) for device in state.devices.values() for z in device.releases)
    return 1 + round((least / 0.01) ** 2 * (FLEET - 1))


def run_fleet(strategy: str, epsilon: float | None, seed: int) -> dict[str, Any]:
    privacy = Privacy()
    if epsilon is not None:
        sigma = noise_multiplier(epsilon) * math.sqrt((FLEET - 1) / max(1, holders(strategy) - 1))
        privacy = Privacy(CLIP, sigma, SHARED, FLEET - 1, DELTA)
    rows, _ = simulated(strategy, privacy, seed, FLEET, FLEET_ROUNDS)
    return {
        "noise_multiplier": privacy.noise_multiplier,
        "spent": rows[-1].get("epsilon"),
        "accuracy": rows[-1]["accuracy"],
        "accuracies": [row["accuracy"] for row in rows],
    }


def secret_lots() -> list[dict[str, float]]:
    """What thousands of boards would pay if nobody could know whom a round asks, which this server doesn't claim."""
    import dp_accounting as accounting

    rows = []
    for share in (1.0, 0.1, 0.01):
        accountant, event = accounting.rdp.RdpAccountant(), accounting.GaussianDpEvent(1.0)
        accountant.compose(event if share == 1 else accounting.PoissonSampledDpEvent(share, event), 100)
        asked = float(accounting.get_epsilon_gaussian(round(100 * share) ** -0.5, DELTA))
        rows.append({"share": share, "poisson": accountant.get_epsilon(DELTA), "asked": asked})
    return rows


def main() -> None:
    if "--fleet" in sys.argv:
        sys.argv.remove("--fleet")
        cases = [{"strategy": s, "epsilon": e, "seed": seed} for seed in SEEDS for s in STRATEGIES for e in EPSILONS]
        run_cases("private_fleet", __doc__, cases, run_fleet, "dp-accounting")
        return
    rows = run_cases("privacy", __doc__, six_cases(), run_six, "dp-accounting")
    if "--out" not in sys.argv and len(rows) == len(list(six_cases())):
        body = json.loads((RESULTS / "privacy.json").read_text())
        save("privacy", {**body, "secret_lots": secret_lots()})


if __name__ == "__main__":
    main()
