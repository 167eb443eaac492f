"""Predicted memory against what was measured, with the onnxruntime of most boards and that of JetPack 6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedprune.coordination.planning import Planner
from fedprune.coordination.state import Device
from fedprune.costs import Costs
from fedprune.features import Features
from fedprune.plan import Plan
from fedprune.strategies import compose
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.demo_fleet import BOARDS, fleet_job
from fedprune_server.simulation.digits import digits_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "planner.json"
SAMPLES = 512
LOW, HIGH = -0.05, 0.15

DEMO = {
    "attic-zero": (119, {"1.31.1": 102e6, "1.23.2": 89.9e6}),
    "barn-zero": (250, {"1.31.1": 99e6, "1.23.2": 90.1e6}),
    "desk-x86": (212, {"1.31.1": 106e6, "1.23.2": 93.8e6}),
    "dock-orin": (142, {"1.31.1": 105e6, "1.23.2": 93.7e6}),
    "hall-pi5": (139, {"1.31.1": 104e6, "1.23.2": 93.0e6}),
    "yard-pi4": (146, {"1.31.1": 103e6, "1.23.2": 92.1e6}),
}
"""Samples of the demo's boards, and the peak of their processes by version of onnxruntime; they don't probe."""


@pytest.mark.parametrize("name", sorted(DEMO))
def test_memory_of_the_demos_boards_is_predicted(name: str) -> None:
    samples, measured = DEMO[name]
    job, model = fleet_job(), import_onnx(digits_model(), "digits")
    board = next(b for b in BOARDS if b.name == name)
    device = Device(1, True, board.profile().to_dict(), None, samples)
    Planner(job, compose(job), model.architecture).plan(name, device)
    assert device.plan is not None, device.excluded
    predicted = Plan.from_dict(device.plan).prediction.memory_bytes
    assert all(LOW <= predicted / peak - 1 <= HIGH for peak in measured.values())


def test_memory_of_eleven_nets_is_predicted() -> None:
    rows = [r for r in json.loads(RESULTS.read_text())["rows"] if r["what"] == "training"]
    assert {r["onnxruntime"] for r in rows} == {"1.31.1", "1.23.2"}
    assert len({r["net"] for r in rows}) == 11
    for row in rows:
        costs, process = Costs(**row["costs"]), row["process_bytes"]
        predicted = costs.training_memory(row["batch"], Features(), SAMPLES, process=process).total
        assert LOW <= predicted / row["peak_bytes"] - 1 <= HIGH, row


def test_memory_of_nets_whose_activations_take_most_is_predicted() -> None:
    rows = json.loads(RESULTS.read_text())["large"]
    assert {("efficientnet_b0", 224), ("mobilenetv3_small_100", 224)} <= {(r["net"], r["image"]) for r in rows}
    for row in rows:
        costs, process = Costs(**row["costs"]), row["process_bytes"]
        predicted = costs.training_memory(row["batch"], Features(), SAMPLES, process=process).total
        assert LOW <= predicted / row["peak_bytes"] - 1 <= HIGH, row
