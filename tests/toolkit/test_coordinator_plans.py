"""What a coordinator's plans learn from rounds' own times, and from what boards measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from coordinator_shell import digest

from fedprune import profile_store
from fedprune.coordination import Coordinator, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress
from fedprune.latency import typical_table
from fedprune.plan import Plan
from fedprune.prediction import predict
from fedprune.probe_report import ProbeReport
from toy import ARCHITECTURE, JOB

pytestmark = pytest.mark.board


PI = profile_store.find("raspberry-pi-5")


def planned_fleet(deadline_s: float = 10_000) -> Coordinator:
    job = replace(JOB, density=0.0, devices=1, rounds=9, deadline_s=deadline_s)
    coordinator = Coordinator(job, ARCHITECTURE, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 10), 0.0)
    return coordinator


def play(coordinator: Coordinator, times: float, peak: float = 0.0) -> None:
    """One round in which steps take `times` as long as the plan says; `peak` is its measured memory in bytes."""
    state = coordinator.state
    coordinator.handle(on.Scored(state.round, "r"), 0.0)
    offer = {"weights": {"sha256": digest(state.round)}, "widths": [2], "recipe": coordinator.job.recipe.to_offer()}
    coordinator.handle(on.Extracted(state.round, "a", 1, offer), 0.0)
    plan = state.devices["a"].plan
    assert plan is not None
    metrics = {"step_seconds": times * plan["prediction"]["step_s"]} | ({"peak_memory_bytes": peak} if peak else {})
    update = on.UpdateAnnounced("a", state.round, 1, digest(state.round), {"sha256": "u"}, 10, 1, metrics)
    coordinator.handle(update, 0.0)
    coordinator.handle(on.UpdateStored("a", state.round, 1, "w"), 0.0)
    coordinator.handle(on.Folded("a", state.round, 1), 0.0)


def test_a_rounds_own_times_correct_a_plan_that_was_far_off() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    play(coordinator, 3.0)
    device = coordinator.state.devices["a"]
    assert before is not None
    assert device.plan is not None
    assert device.correction == {"step": pytest.approx(3.0), "latency": 1.0, "memory": 0.0}
    assert device.plan["prediction"]["step_s"] == pytest.approx(3 * before["prediction"]["step_s"])
    assert State.from_json(coordinator.state.to_json()).devices["a"] == device


def test_a_rounds_own_memory_corrects_a_plan_that_was_far_off() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    assert before is not None
    predicted = before["prediction"]["memory_bytes"]
    play(coordinator, 1.0, predicted + 50e6)
    device = coordinator.state.devices["a"]
    assert device.plan is not None
    assert device.correction["memory"] == 50e6
    assert device.plan["prediction"]["memory_bytes"] == predicted + 50e6
    assert device.plan["prediction"]["memory"]["learnt"] == 50e6
    assert "50.00 MB more memory" in Plan.from_dict(device.plan).describe()


def test_a_device_that_turns_out_to_need_too_much_memory_gets_a_narrower_model_or_goes_on_as_it_is() -> None:
    """It delivered: what it measured never shuts it out."""
    room = predict(ARCHITECTURE, ARCHITECTURE.sizes, PI, JOB.recipe, 10).memory_bytes + 1000
    small = replace(PI, memory=replace(PI.memory, total_bytes=room, reserve_bytes=0, training_share=1.0))
    coordinator = Coordinator(replace(JOB, density=0.0, devices=1, rounds=9), ARCHITECTURE, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, small.to_dict(), 10), 0.0)
    play(coordinator, 1.0, 1.5 * room)
    device = coordinator.state.devices["a"]
    assert (device.excluded, device.widths) == ("", ARCHITECTURE.sizes)
    coordinator.handle(on.DeviceBorn("a", 2, small.to_dict(), 11), 0.0)
    device = coordinator.state.devices["a"]
    assert (device.excluded, device.widths) == ("", ARCHITECTURE.sizes)
    assert device.correction["memory"] > 0


def test_a_plan_that_was_nearly_right_stays_as_it_is() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    play(coordinator, 1.1)
    assert coordinator.state.devices["a"].plan == before


def test_times_at_other_widths_than_the_plans_teach_nothing() -> None:
    """The device came again, as a board that may send less, after its part in the round was settled."""
    coordinator = planned_fleet()
    narrow = predict(ARCHITECTURE, (4,), PI, coordinator.job.recipe, 10).round_bytes
    weaker = replace(PI, link=replace(PI.link, bytes_per_round=narrow))
    coordinator.handle(on.DeviceBorn("a", 2, weaker.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    before = device.plan
    assert (device.widths, coordinator.state.tasks["a"].widths) == ((4,), ARCHITECTURE.sizes)
    play(coordinator, 3.0)
    assert coordinator.state.tasks["a"].progress is Progress.FOLDED
    assert (device.correction, device.plan) == ({}, before)


def too_slow() -> Coordinator:
    """A fleet after a round that was so slow that no width would be fast enough."""
    probing = planned_fleet().state.devices["a"].plan
    assert probing is not None
    round_s = 1.5 * probing["prediction"]["train_s"] + probing["prediction"]["transfer_s"]
    coordinator = planned_fleet(deadline_s=round_s)
    device = coordinator.state.devices["a"]
    before = device.plan, device.widths
    play(coordinator, 1e9)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert (device.plan, device.widths) == before
    return coordinator


def test_a_device_that_turns_out_too_slow_for_any_width_goes_on_as_it_is() -> None:
    assert too_slow().state.devices["a"].correction["step"] == 5


@pytest.mark.parametrize("samples", [10, 9])
def test_a_device_that_is_too_slow_may_connect_anew(samples: int) -> None:
    coordinator = too_slow()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), samples), 0.0)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert device.widths == ARCHITECTURE.sizes


def test_a_device_that_is_too_slow_outlasts_a_restart_and_unlearns() -> None:
    before = too_slow()
    coordinator = Coordinator(before.job, ARCHITECTURE, State.from_json(before.state.to_json()))
    coordinator.resume(0.0)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert device.widths == ARCHITECTURE.sizes

    coordinator.handle(on.Closed(1, "m1"), 0.0)
    coordinator.handle(on.Evaluated(1, {}), 0.0)
    play(coordinator, 1.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(1)


def test_a_device_that_no_width_fits_stays_out_whatever_it_learnt() -> None:
    coordinator = too_slow()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10**9), 0.0)
    assert "breaks" in coordinator.state.devices["a"].excluded


def test_what_was_learnt_of_a_guess_is_forgotten_once_the_board_has_measured() -> None:
    coordinator = planned_fleet()
    play(coordinator, 3.0)
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(4e9))
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction == {}

    coordinator = planned_fleet()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    play(coordinator, 3.0)
    other = replace(probe, memory_available=6 * 10**9)
    coordinator.handle(on.DeviceBorn("a", 3, PI.to_dict(), 10, other.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(3.0)


def test_what_was_learnt_in_blocks_says_nothing_of_standard_operators() -> None:
    coordinator = planned_fleet()
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(4e9), block=16)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    play(coordinator, 3.0)
    assert coordinator.state.devices["a"].correction
    coordinator.handle(on.DeviceBorn("a", 3, PI.to_dict(), 10, replace(probe, block=0).to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction == {}


def test_what_was_learnt_outlasts_a_new_connection() -> None:
    coordinator = planned_fleet()
    play(coordinator, 3.0)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 11), 0.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(3.0)


def test_what_a_probe_says_of_blocks_reaches_whoever_makes_the_offer() -> None:
    job = replace(JOB, devices=3)
    coordinator = Coordinator(job, ARCHITECTURE, State(model=digest("first")))
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, block=16).to_dict()
    older = {k: v for k, v in probe.items() if k != "block"}
    said = {"a": probe, "b": older, "c": None}
    commands = [
        command
        for name, report in said.items()
        for command in coordinator.handle(on.DeviceBorn(name, 1, PI.to_dict(), 10, report), 0.0)
    ]
    assert [type(c) for c in commands] == [do.Score]
    asked = coordinator.handle(on.Scored(1, digest("ranking")), 0.0)
    wanted = {"a": 16, "b": 0, "c": 0}
    assert {c.part.device: c.block for c in asked if isinstance(c, do.Extract)} == wanted
    again = Coordinator(job, ARCHITECTURE, State.from_json(coordinator.state.to_json())).resume(1.0)
    assert {c.part.device: c.block for c in again if isinstance(c, do.Extract)} == wanted
