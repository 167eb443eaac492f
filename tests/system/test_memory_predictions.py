"""Predicted memory against what was measured, with the onnxruntime of most boards and that of JetPack 6."""

import json
import statistics
import sys
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import planner
from fedprune.coordination.width_planner import WidthPlanner
from fedprune.jobs.state import JobDevice
from fedprune.model.features import Features
from fedprune.planning.costs import Costs
from fedprune.planning.profile_store import find_profile
from fedprune.planning.width_plan import WidthPlan
from fedprune.strategies import compose
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.fleet.demo_fleet import DEMO_BOARDS, demo_job
from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "planner.json"
LOW, HIGH = -0.05, 0.15

DEMO = {
    "attic-zero": (119, 290_000, {"1.31.1": 102e6, "1.23.2": 89.9e6}),
    "barn-zero": (250, 290_000, {"1.31.1": 99e6, "1.23.2": 90.1e6}),
    "desk-x86": (212, 430_000, {"1.31.1": 106e6, "1.23.2": 93.8e6}),
    "dock-orin": (142, 430_000, {"1.31.1": 105e6, "1.23.2": 93.7e6}),
    "hall-pi5": (139, 430_000, {"1.31.1": 104e6, "1.23.2": 93.0e6}),
    "yard-pi4": (146, 350_000, {"1.31.1": 103e6, "1.23.2": 92.1e6}),
}
"""Samples of the demo's boards, the bytes that a round might take when they were measured, without codecs, and the
peak of their processes by version of onnxruntime; they don't probe."""


@pytest.mark.parametrize("name", sorted(DEMO))
def test_memory_of_the_demos_boards_is_predicted(name: str) -> None:
    samples, budget, measured = DEMO[name]
    job, model = replace(demo_job(), byte_budget=budget), import_onnx(digits_model(), "digits")
    board = next(b for b in DEMO_BOARDS if b.name == name)
    device = JobDevice(1, True, find_profile(board.kind).to_dict(), None, samples)
    WidthPlanner(job, compose(job), model.architecture).plan(name, device)
    assert device.plan is not None, device.excluded
    expected = WidthPlan.from_dict(device.plan).prediction.memory_bytes
    assert all(LOW <= expected / peak - 1 <= HIGH for peak in measured.values())


@pytest.mark.parametrize(
    ("group", "nets"),
    [("rows", {"VGG11-BN", "convnext_atto"}), ("large", {"efficientnet_b0", "gru_net", "PooledNet", "OverlapNet"})],
)
def test_memory_of_training_and_predicting_is_predicted(group: str, nets: set[str]) -> None:
    rows = json.loads(RESULTS.read_text())[group]
    assert {r["onnxruntime"] for r in rows} == {"1.31.1", "1.23.2"}
    assert nets <= {r["net"] for r in rows}
    assert len({(r["net"], r["image"]) for r in rows}) == {"rows": 11, "large": 10}[group]
    for row in rows:
        assert LOW <= predicted_peak_bytes(row, rows) / row["peak_bytes"] - 1 <= HIGH, row


def test_memory_of_training_nets_that_no_constant_was_fitted_to_is_predicted() -> None:
    rows = json.loads(RESULTS.read_text())["held_out"]
    assert {"PooledNet-5", "WidePooledNet", "fasternet_t0"} <= {r["net"] for r in rows}
    for row in rows:
        if row["what"] == "training":
            assert LOW <= predicted_peak_bytes(row, rows) / row["peak_bytes"] - 1 <= HIGH, row


@pytest.mark.soak  # a round of a second and a half in a process of its own, beside what `RESULTS` has of it
def test_memory_of_training_a_net_of_large_pooled_images_is_predicted() -> None:
    case = next(case for case in planner.cases() if case["net"] == "PooledNet")
    rows = planner.measure({**case, "batches": (32,)}, [sys.executable])
    (row,) = (row for row in rows if row["what"] == "training")
    assert LOW <= predicted_peak_bytes(row, rows) / row["peak_bytes"] - 1 <= HIGH, row


def predicted_peak_bytes(row: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    """Peak memory by today's constants, of a process that measured itself."""
    costs = Costs(**row["costs"])
    if row["what"] == "training":
        return costs.training_memory(row["batch"], Features(), row["samples"], process=row["process_bytes"]).total
    alike = [r["process_bytes"] for r in rows if r["process_bytes"] and r["onnxruntime"] == row["onnxruntime"]]
    return costs.inference_bytes(row["batch"], int(statistics.median(alike)))
