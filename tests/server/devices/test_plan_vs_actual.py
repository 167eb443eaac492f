"""Predicted beside measured: only at the widths that a device has now, in the status, the record and the report."""

from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State
from fedprune.core.text import amount
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.recipe import Recipe
from fedprune.planning import profile_store
from fedprune.planning.correction import NO_CORRECTION
from fedprune.planning.plan_search import PlanSearch
from fedprune_server.devices.plan_vs_actual import compare_device, comparison_text, predicted_figures
from support.fakes import tiny_job as toy

BOARD = profile_store.find_profile("raspberry-pi-5")
JOB = Job(name="leaves", recipe=Recipe())
PLAN = PlanSearch(toy.ARCHITECTURE, BOARD, JOB.recipe, 100).search()
METRICS = {"step_seconds": 2 * PLAN.prediction.step_s, "latency_seconds": 0.5, "peak_memory_bytes": 1e8}


def state(metrics: dict[str, float], widths: tuple[int, ...] = PLAN.widths, **changes: Any) -> State:
    device = JobDevice(1, True, BOARD.to_dict(), None, 100, PLAN.to_dict(), PLAN.widths)
    row = {
        "round": 1,
        "at": 1.0,
        "model": "0" * 64,
        "metrics": {},
        "devices": {"pi": {"progress": "folded", "widths": list(widths), "metrics": metrics, "reason": ""}},
    }
    return State(model="0" * 64, round=1, devices={"pi": replace(device, **changes)}, history=[row])


def test_a_devices_predictions_stand_beside_its_measurements() -> None:
    rows = compare_device("pi", state(METRICS), vars(PLAN.prediction))
    assert rows["step_seconds"] == (PLAN.prediction.step_s, METRICS["step_seconds"])
    assert rows["latency_seconds"] == (PLAN.prediction.latency_s, 0.5)
    assert rows["peak_memory_bytes"] == (PLAN.prediction.memory_bytes, 1e8)
    assert "memory 100.00 MB (predicted" in comparison_text(rows, rows)


def test_measurements_at_other_widths_are_left_out() -> None:
    wider = state(METRICS, widths=tuple(w + 1 for w in PLAN.widths))
    assert all(measured is None for _, measured in compare_device("pi", wider, vars(PLAN.prediction)).values())
    assert compare_device("nobody", wider, None) == {}


def test_a_prediction_is_the_one_before_any_round_whatever_rounds_taught() -> None:
    learnt = NO_CORRECTION.corrected_by(PLAN.prediction, NO_CORRECTION, METRICS)
    corrected = PlanSearch(toy.ARCHITECTURE, BOARD, JOB.recipe, 100, correction=learnt).search()
    device = replace(state(METRICS).devices["pi"], plan=corrected.to_dict())
    first, since = (
        compare_device("pi", state(METRICS), vars(p)) for p in (corrected.before_rounds, corrected.prediction)
    )
    before_rounds, taught = (amount(p.step_s, "s") for p in (corrected.before_rounds, corrected.prediction))
    assert f"(predicted {before_rounds}, {taught} since the rounds measured it)" in comparison_text(first, since)
    assert corrected.prediction.step_s == METRICS["step_seconds"], "what a plan says now agrees by itself"
    foretold = predicted_figures("pi", device, JOB, toy.ARCHITECTURE)
    assert foretold is not None
    for figure in ("step_s", "latency_s", "train_s", "memory_bytes"):
        assert foretold[figure] == pytest.approx(vars(PLAN.prediction)[figure]), figure


def test_widths_that_the_job_gives_are_predicted_for_too() -> None:
    bare = replace(state(METRICS).devices["pi"], plan=None)
    assert predicted_figures("pi", bare, JOB, toy.ARCHITECTURE) == vars(PLAN.prediction)
    assert predicted_figures("pi", replace(bare, widths=()), JOB, toy.ARCHITECTURE) is None
