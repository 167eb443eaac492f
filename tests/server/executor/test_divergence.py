"""A job whose training ran away says so at its end, and what to change."""

from __future__ import annotations

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
from fedprune.updates.privacy import Privacy
from fedprune_server.executor.divergence import advice, is_uncalibrated, of_history, warn
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.report import summary_text
from fedprune_server.simulation.results.run_folder import simulate
from support.fakes.digits_simulation import boards, digits_experiment, digits_net

JOB = {"recipe": Recipe(lr=0.5).to_dict()}


@given(st.lists(st.floats(0.0, 100.0), max_size=5), st.floats(0.0, 1.0))
def test_a_loss_that_ends_no_higher_than_it_began_is_fine(losses: list[float], share: float) -> None:
    if losses:
        losses[-1] = losses[0] * share
    assert advice(losses, [], JOB) == ""


@given(st.floats(1e-6, 1e6), st.floats(1.2, 1e6))
def test_a_loss_that_rose_is_told_with_the_settings_to_change(first: float, rise: float) -> None:
    said = advice([first, first * rise], [], JOB)
    assert said.startswith("training diverged: the global model's loss rose, from ")
    for setting in ("lr (now 0.5; try a tenth)", "momentum (now 0.9)", "clip_norm (now 0; try 1)", "samples"):
        assert setting in said


@pytest.mark.parametrize(
    ("clip", "said"),
    [(1.0, "lower clip_norm (now 1; try a tenth)"), (5.0, "set clip_norm (now 5; try 1)"), (0.0, "(now 0; try 1)")],
)
def test_no_setting_is_proposed_that_is_made_already(clip: float, said: str) -> None:
    told = advice([1.0, 9.0], [], {"recipe": Recipe(clip_norm=clip, momentum=0.0).to_dict()})
    assert said in told
    assert "momentum" not in told


def test_a_private_job_is_told_of_its_noise() -> None:
    job = Job(privacy=Privacy(clip=0.5, noise_multiplier=2.0))
    told = advice([1.0, 9.0], [], job.to_dict())
    assert "the noise of [job.privacy]" in told
    assert "noise_multiplier (now 2) times clip (now 0.5)" in told
    assert "learning rate" not in told
    clipped = Job(privacy=Privacy(clip=0.5))
    assert "learning rate" in advice([1.0, 9.0], [], clipped.to_dict())


def test_batch_norms_that_nothing_calibrates_come_before_the_learning_rate() -> None:
    told = advice([1.0, 9.0], [], JOB, mixed=True)
    assert told.startswith("training diverged: the global model's loss rose, from 1 after the first round to 9")
    assert 0 < told.index("data in [calibration]") < told.index("lower lr (now 0.5")
    assert "calibration" not in advice([1.0, float("nan")], [], JOB, mixed=True)
    assert "The most likely cause is the model's batch-norm statistics:" in told


def test_the_noise_of_a_private_job_comes_before_its_batch_norms() -> None:
    private = Job(privacy=Privacy(clip=0.5, noise_multiplier=2.0)).to_dict()
    told = advice([1.0, 9.0], [], private, mixed=True)
    assert 0 < told.index("the noise of [job.privacy]") < told.index("data in [calibration]")
    assert told.count("The most likely cause") == 1


def test_a_history_names_calibration_only_where_boards_of_several_widths_are_averaged() -> None:
    def rows(density: float) -> list[dict[str, Any]]:
        part = {"progress": "folded", "reason": "", "density": density}
        return [{"metrics": {"samples": 9, "loss": loss}, "devices": {"a": part}} for loss in (1.0, 9.0)]

    assert "[calibration]" in of_history(rows(0.5), JOB, uncalibrated=True)
    assert "[calibration]" not in of_history(rows(0.5), JOB, uncalibrated=False)
    assert "[calibration]" not in of_history(rows(1.0), JOB, uncalibrated=True)


def test_norms_that_are_frozen_need_no_calibration() -> None:
    model = digits_net()
    assert is_uncalibrated(model.architecture, Recipe(), None)
    assert not is_uncalibrated(model.architecture, Recipe(), "calibration.npz")
    names = tuple(t.name for t in model.architecture.statistics)
    assert not is_uncalibrated(model.architecture, Recipe(frozen=names), None)
    assert not is_uncalibrated(model.architecture, Recipe(), None, names)


@pytest.mark.parametrize("last", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_told(last: float | None) -> None:
    assert "no longer finite" in advice([1.0, last], [], JOB)


def test_a_history_without_evaluation_is_judged_by_its_devices() -> None:
    part = {"progress": "refused", "reason": "x", "kind": "diverged"}
    rows = [{"metrics": {}, "devices": {"a": part, "b": {"progress": "folded", "reason": ""}}}]
    assert "1 of the devices" in of_history(rows, JOB, uncalibrated=True)
    assert of_history([{"metrics": {}, "devices": {}}], JOB, uncalibrated=True) == ""
    assert of_history([], JOB, uncalibrated=True) == ""


def test_one_board_of_ten_whose_numbers_are_not_finite_is_no_divergence(caplog: pytest.LogCaptureFixture) -> None:
    parts = {f"d{i}": {"progress": "folded", "reason": ""} for i in range(9)}
    rows = [{"metrics": {}, "devices": {**parts, "bad": {"progress": "refused", "reason": "x", "kind": "diverged"}}}]
    assert of_history(rows, JOB, uncalibrated=True) == ""
    event = on.UpdateRejected("bad", 1, 1, "x", FailureKind.DIVERGED)
    warn(event, Job(), "", [*[""] * 9, "diverged"])
    assert "bad" in caplog.text
    assert "learning rate" not in caplog.text
    warn(replace(event, kind=FailureKind.MALFORMED), Job(), "", ["diverged", "diverged", "malformed"])
    assert "learning rate" not in caplog.text
    warn(event, Job(), "", ["diverged", "diverged", ""])
    assert "learning rate" in caplog.text


def experiment(lr: float) -> Experiment:
    fleet, recipe = boards(("a", "b"), "raspberry-pi-5"), Recipe(max_steps=5, lr=lr, momentum=0.0)
    return digits_experiment(fleet, seed=0, density=0.25, recipe=recipe)


def test_a_summary_says_so_of_a_run_that_diverged_and_of_no_other(tmp_path: Path) -> None:
    record = simulate(experiment(0.05), tmp_path)
    assert "diverged" not in summary_text(record)
    *before, last = record.rounds
    assert "training diverged" in summary_text(
        replace(record, rounds=(*before, replace(last, metrics={"accuracy": 0.1})))
    )
    risen = replace(record, rounds=(*before, replace(last, metrics={"loss": 99.0})))
    assert "[calibration]" in summary_text(risen)
    assert "[calibration]" not in summary_text(replace(risen, uncalibrated=False))


def test_a_simulation_of_which_nothing_counts_any_more_says_what_to_change(tmp_path: Path) -> None:
    said = r"standstill\. Device a \(and 1 other\): .*Training diverged: 2 of the devices.*lower lr \(now 1000;"
    with pytest.raises(DivergedError, match=said):
        simulate(experiment(1000.0), tmp_path)
