"""A job whose training ran away says so at its end, and what to change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination import events as on
from fedprune.core.errors import DivergedError
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune_server.executor.divergence import diagnose_history, diagnose_losses, warn_of_rejection
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from support.fakes.digits_simulation import boards, digits_experiment

JOB = {"recipe": Recipe(lr=0.5).to_dict()}


@given(st.lists(st.floats(0.0, 100.0), max_size=5), st.floats(0.0, 1.0))
def test_a_loss_that_ends_no_higher_than_it_began_is_fine(losses: list[float], share: float) -> None:
    if losses:
        losses[-1] = losses[0] * share
    assert diagnose_losses(losses, [], JOB) == ""


def test_a_history_names_calibration_only_where_boards_of_several_widths_are_averaged() -> None:
    def rows(density: float) -> list[dict[str, Any]]:
        task = {"progress": "folded", "reason": "", "density": density}
        return [{"metrics": {"samples": 9, "loss": loss}, "devices": {"a": task}} for loss in (1.0, 9.0)]

    assert "[calibration]" in diagnose_history(rows(0.5), JOB, uncalibrated=True)
    assert "[calibration]" not in diagnose_history(rows(0.5), JOB, uncalibrated=False)
    assert "[calibration]" not in diagnose_history(rows(1.0), JOB, uncalibrated=True)


@pytest.mark.parametrize("last", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_told(last: float | None) -> None:
    assert "no longer finite" in diagnose_losses([1.0, last], [], JOB)


def test_one_board_of_ten_whose_numbers_are_not_finite_is_no_divergence(caplog: pytest.LogCaptureFixture) -> None:
    parts = {f"d{i}": {"progress": "folded", "reason": ""} for i in range(9)}
    rows = [{"metrics": {}, "devices": {**parts, "bad": {"progress": "refused", "reason": "x", "kind": "diverged"}}}]
    assert diagnose_history(rows, JOB, uncalibrated=True) == ""
    event = on.UpdateRejected("bad", 1, 1, "x", FailureKind.DIVERGED)
    warn_of_rejection(event, Job(), "", [*[""] * 9, "diverged"])
    assert "bad" in caplog.text
    assert "learning rate" not in caplog.text
    warn_of_rejection(replace(event, kind=FailureKind.MALFORMED), Job(), "", ["diverged", "diverged", "malformed"])
    assert "learning rate" not in caplog.text
    warn_of_rejection(event, Job(), "", ["diverged", "diverged", ""])
    assert "learning rate" in caplog.text


def experiment(lr: float) -> Experiment:
    fleet, recipe = boards(("a", "b"), "raspberry-pi-5"), Recipe(max_steps=5, lr=lr, momentum=0.0)
    return digits_experiment(fleet, seed=0, density=0.25, recipe=recipe)


def test_a_simulation_of_which_nothing_counts_any_more_says_what_to_change(tmp_path: Path) -> None:
    message = r"standstill\. Device a \(and 1 other\): .*Training diverged: 2 of the devices.*lower lr \(now 1000;"
    with pytest.raises(DivergedError, match=message):
        simulate_in_folder(experiment(1000.0), tmp_path)
