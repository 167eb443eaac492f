"""Predicted beside measured: only at the widths that a device has now, in the status, the record and the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State
from fedprune.core.text import amount
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.cost_prediction import NO_CORRECTION
from fedprune.planning.plan import PlanSearch
from fedprune_server.devices.plan_vs_actual import compare_device, comparison_text, predicted_figures
from support.fakes import tiny_job as toy

BOARD = profile_store.find_profile("raspberry-pi-5")
JOB = Job(name="leaves", recipe=Recipe())
MADE = PlanSearch(toy.ARCHITECTURE, BOARD, JOB.recipe, 100).search()
METRICS = {"step_seconds": 2 * MADE.prediction.step_s, "latency_seconds": 0.5, "peak_memory_bytes": 1e8}


def state(metrics: dict[str, float], widths: tuple[int, ...] = MADE.widths, **changes: Any) -> State:
    device = JobDevice(1, True, BOARD.to_dict(), None, 100, MADE.to_dict(), MADE.widths)
    row = {
        "round": 1,
        "at": 1.0,
        "model": "0" * 64,
        "metrics": {},
        "devices": {"pi": {"progress": "folded", "widths": list(widths), "metrics": metrics, "reason": ""}},
    }
    return State(model="0" * 64, round=1, devices={"pi": replace(device, **changes)}, history=[row])


def test_a_devices_predictions_stand_beside_its_measurements() -> None:
    rows = compare_device("pi", state(METRICS), vars(MADE.prediction))
    assert rows["step_seconds"] == (MADE.prediction.step_s, METRICS["step_seconds"])
    assert rows["latency_seconds"] == (MADE.prediction.latency_s, 0.5)
    assert rows["peak_memory_bytes"] == (MADE.prediction.memory_bytes, 1e8)
    assert "memory 100.00 MB (predicted" in comparison_text(rows, rows)


def test_measurements_at_other_widths_are_left_out() -> None:
    other = state(METRICS, widths=tuple(w + 1 for w in MADE.widths))
    assert all(seen is None for _, seen in compare_device("pi", other, vars(MADE.prediction)).values())
    assert compare_device("nobody", other, None) == {}


def test_a_prediction_is_the_one_before_any_round_whatever_rounds_taught() -> None:
    learnt = NO_CORRECTION.corrected_by(MADE.prediction, NO_CORRECTION, METRICS)
    again = PlanSearch(toy.ARCHITECTURE, BOARD, JOB.recipe, 100, correction=learnt).search()
    device = replace(state(METRICS).devices["pi"], plan=again.to_dict())
    first, since = (compare_device("pi", state(METRICS), vars(p)) for p in (again.before_rounds, again.prediction))
    known, taught = (amount(p.step_s, "s") for p in (again.before_rounds, again.prediction))
    assert f"(predicted {known}, {taught} since the rounds measured it)" in comparison_text(first, since)
    assert again.prediction.step_s == METRICS["step_seconds"], "what a plan says now agrees by itself"
    foretold = predicted_figures("pi", device, JOB, toy.ARCHITECTURE)
    assert foretold is not None
    for figure in ("step_s", "latency_s", "train_s", "memory_bytes"):
        assert foretold[figure] == pytest.approx(vars(MADE.prediction)[figure]), figure


def test_widths_that_the_job_gives_are_predicted_for_too() -> None:
    device = state(METRICS).devices["pi"]
    bare = replace(device, plan=None)
    assert predicted_figures("pi", bare, JOB, toy.ARCHITECTURE) == vars(MADE.prediction)
    assert predicted_figures("pi", replace(bare, widths=()), JOB, toy.ARCHITECTURE) is None
