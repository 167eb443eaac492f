"""What differential privacy costs: accuracy against ε, for FedAvg and fedprune on the demo's digits.

    OMP_NUM_THREADS=1 python -m benchmarks.privacy

The demo's six boards, simulated, by noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Record, run_cases
from fedprune.blobs.blob_store import BlobStore
from fedprune.updates.privacy import Privacy
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal_digits, digits_model
from fedprune_server.simulation.experiment import Experiment, fedavg_job
from fedprune_server.simulation.fleet.demo_fleet import DEMO_BOARDS, demo_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

DELTA, CLIP = 1e-5, 1.0
STRATEGIES = ("fedavg", "fedprune")
LAST = 3
"""Rounds of which accuracies are means."""

ROUNDS = 12


def cases() -> Iterator[dict[str, Any]]:
    """The runs."""
    for strategy in STRATEGIES:
        yield {"strategy": strategy, "clip": 0.0, "noise": "local", "multiplier": 0.0}
        yield {"strategy": strategy, "clip": CLIP, "noise": "local", "multiplier": 0.0}
        for noise, multipliers in (("local", (0.03, 0.1, 0.3)), ("shared", (0.1, 0.3, 1.0))):
            for multiplier in multipliers:
                yield {"strategy": strategy, "clip": CLIP, "noise": noise, "multiplier": multiplier}


def run(strategy: str, clip: float, noise: str, multiplier: float) -> dict[str, Any]:
    """ε and accuracy of a job."""
    boards = 0 if noise == "local" else len(DEMO_BOARDS) - 1
    privacy = Privacy(clip, multiplier, noise, boards, DELTA) if clip else Privacy()
    job = replace(demo_job(0, ROUNDS) if strategy == "fedprune" else fedavg_job(demo_job(0, ROUNDS)), privacy=privacy)
    data = deal_digits([board.name for board in DEMO_BOARDS], seed=0)
    devices = [VirtualDevice(board.name, board.profile(), data.devices[board.name]) for board in DEMO_BOARDS]
    model = import_onnx(digits_model(), "digits-net")
    experiment = Experiment("privacy", job, model, devices, (data.x, data.y), data.calibration)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row["metrics"] for row in Simulation(experiment, BlobStore(Path(folder), durable=False)).run()]
    return {
        "epsilon": rows[-1].get("epsilon"),
        "accuracy": float(np.mean([row["accuracy"] for row in rows[-LAST:]])),
        "accuracies": [row["accuracy"] for row in rows],
        "epsilons": [row.get("epsilon") for row in rows],
    }


def secret_lots(_: Sequence[Record]) -> list[dict[str, float]]:
    """What thousands of boards would pay if nobody could know whom a round asks, which this server doesn't claim."""
    import dp_accounting as accounting

    rows = []
    for share in (1.0, 0.1, 0.01):
        accountant, event = accounting.rdp.RdpAccountant(), accounting.GaussianDpEvent(1.0)
        accountant.compose(event if share == 1 else accounting.PoissonSampledDpEvent(share, event), 100)
        asked = float(accounting.get_epsilon_gaussian(round(100 * share) ** -0.5, DELTA))
        rows.append({"share": share, "poisson": accountant.get_epsilon(DELTA), "asked": asked})
    return rows


if __name__ == "__main__":
    run_cases("privacy", __doc__, cases(), run, "dp-accounting", secret_lots=secret_lots)
