"""The coordinator under every order of events: nothing counts twice, nothing is lost, a crash changes nothing."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import Phase, State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, Progress
from support.fakes.coordinator_shell import digest
from support.fakes.synchronous_shell import Shell
from support.fakes.tiny_job import ARCHITECTURE, JOB, NAMES

pytestmark = pytest.mark.board


def finished_history(shell: Shell) -> list[tuple[int, str]]:
    assert shell.state.phase is Phase.FINISHED
    return [(h["round"], h["model"]) for h in shell.state.history]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_order_duplicates_and_crashes_change_nothing(data: st.DataObject) -> None:
    untouched = Shell()
    untouched.arrive()
    untouched.run()
    shell = Shell()
    shell.arrive()
    shell.feed_in_any_order(data)
    shell.run()

    assert finished_history(shell) == finished_history(untouched)


def test_a_round_that_all_refuse_starts_again_long_before_its_deadline() -> None:
    shell = Shell()
    shell.arrive()
    while shell.state.deadline is None:
        shell.feed(shell.inbox.pop(0))
    assert {task.progress for task in shell.state.tasks.values()} == {Progress.OFFERED}  # it counts from the last offer
    shell.inbox.clear()
    for name in NAMES:
        assert {t.attempt for t in shell.state.tasks.values()} == {1}
        shell.feed(on.OfferRefused(name, 1, 1, "no metric"))
    retry = shell.wakes[-1]
    assert shell.now < retry < shell.now + JOB.deadline_s / 2  # boards may recover, and refusals don't make rounds spin
    shell.now = retry
    shell.feed(on.Ticked())
    assert (shell.state.round, {t.attempt for t in shell.state.tasks.values()}) == (1, {2})


def test_an_update_on_the_disk_counts_though_the_deadline_passes_before_it_is_folded() -> None:
    shell = Shell()
    shell.arrive()
    delayed_events = []
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.Folded):
            delayed_events.append(event)
        elif not (isinstance(event, on.UpdateAnnounced) and event.device == "c"):
            shell.feed(event)
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    assert not shell.closes
    assert ("c", 1, "the deadline has passed") in shell.cancellations
    for event in delayed_events:
        shell.feed(event)

    assert [p.part.device for p in shell.closes[1][0].contributions] == ["a", "b"]


def test_a_round_is_not_offered_to_the_same_silent_device_for_ever() -> None:
    shell = Shell(replace(JOB, devices=1, participation=0.1))
    for name in (names := [f"d{i}" for i in range(10)]):
        shell.feed(shell.birth_event(name))
    asked = []
    for _ in range(30):
        shell.run_silently()
        asked += shell.state.tasks
        shell.now = shell.wakes[-1]
        shell.feed(on.Ticked())
    assert len(asked) == 30
    assert len(set(asked)) >= len(names) / 2


def test_a_finished_job_goes_on_with_more_rounds_and_only_then() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.crash()
    assert shell.state.phase is Phase.FINISHED
    shell.job = replace(JOB, rounds=JOB.rounds + 2)
    shell.crash()
    shell.run()
    assert [r for r, _ in finished_history(shell)] == list(range(1, JOB.rounds + 3))


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_job_that_its_allocator_ended_stays_finished(synchronous: bool) -> None:
    job = Job(rounds=100, strategy="pr-fl", options={"synchronous": synchronous})
    state = State(model="m7", phase=Phase.FINISHED, round=7, allocation={"done": True})
    assert [c for c in make_coordinator(job, ARCHITECTURE, state).resume(0.0) if not isinstance(c, do.WakeAt)] == [
        do.Finish("m7", "ended after round 7 of 100: the strategy ended the job")
    ]
    assert state.phase is Phase.FINISHED


def test_all_that_an_offer_names_is_kept() -> None:
    refs = {name: {"sha256": digest(name), "size": 1, "leaves": digest(name)} for name in ("weights", "y")}
    state = State(model=digest("first"))
    offer = {"weights": refs["weights"], "lowered": {"int8": refs["y"]}, "widths": [1]}
    state.tasks["a"] = DeviceTask(1, (1,), offer=offer)
    assert state.references() >= {ref["sha256"] for ref in refs.values()}
