"""How long rounds wait for devices, by what their last answers took, and what becomes of those that are silent."""

from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.jobs.state import Progress
from fedprune.planning import profile_store
from support.fakes.timed_shell import Board, Timed, announced_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board

ASYNCHRONOUS = {"kind": "async", "arrivals": 3}


def shell_of(slow: Board, **settings: object) -> Timed:
    job = replace(JOB, **{"rounds": 30, "deadline_s": 1000, **settings})  # type: ignore[arg-type]
    return announced_shell(job, {"a": Board(1.0), "b": Board(1.0), "c": slow})


@pytest.mark.parametrize("in_flight", [0, 3])
def test_a_device_that_always_took_long_is_waited_for(in_flight: int) -> None:
    shell = shell_of(Board(300.0), in_flight=in_flight)
    shell.run()
    assert shell.counted_devices() == [["a", "b", "c"]] * 30


def test_devices_that_become_slower_together_all_count() -> None:
    """The first answer shows that the others may take as long: what kept it may be the broker."""
    shell = shell_of(Board(1.0))
    shell.run(rounds=3)
    for place, board in enumerate(shell.boards.values()):
        board.seconds = 30.0 + place
    shell.run(rounds=5)
    assert shell.counted_devices() == [["a", "b", "c"]] * 5


def test_one_that_becomes_slower_misses_a_round_or_two_and_is_waited_for_as_long_as_its_late_answer_took() -> None:
    shell = shell_of(Board(10.0), rounds=200)
    shell.run(rounds=10)
    shell.boards["c"].seconds = 300.0
    shell.run()
    counts = ["c" in names for names in shell.counted_devices()]
    assert all(counts[:10])
    assert not counts[10]
    assert all(counts[-3:])
    assert not shell.state.devices["c"].excluded


@pytest.mark.parametrize("schedule", [{}, ASYNCHRONOUS])
def test_silence_is_remembered_excludes_and_is_forgiven(schedule: dict[str, object]) -> None:
    """Rounds take 2 s; the wait for an answer starts from one of 11 s, not from the deadline of 1,000 s."""
    shell = shell_of(Board(10.0), rounds=4000, schedule=schedule)
    shell.run(rounds=3)
    began = shell.now
    shell.boards["c"] = Board(10.0, stalls=0.0)
    while not shell.state.devices["c"].excluded:
        shell.step()
    assert not any(shell.state.devices[name].failures for name in "ab")
    shell.run(rounds=len(shell.state.history) + 20)
    assert shell.now - began < (4000 if schedule else 100)
    assert State.from_json(shell.state.to_json()) == shell.state
    shell.boards["c"] = Board(10.0)
    while "c" not in shell.counted_devices()[-1]:
        shell.run(rounds=len(shell.state.history) + 1)
    assert not shell.state.devices["c"].excluded


@pytest.mark.parametrize("changes", [{"round": 1}, {"attempt": 9}, {"base": "of an earlier run"}])
@pytest.mark.parametrize("schedule", [{}, ASYNCHRONOUS])
def test_an_announcement_that_was_not_awaited_forgives_no_silence(
    schedule: dict[str, object], changes: dict[str, Any]
) -> None:
    shell = shell_of(Board(1.0), rounds=4000, schedule=schedule)
    shell.run(rounds=3)
    shell.boards["c"].stalls = 0.0
    while not shell.state.devices["c"].failures:
        shell.step()
    round_, _, _ = next(offer for offer in reversed(shell.offered) if offer[1] == "c")
    awaited = on.UpdateAnnounced("c", round_, 1, "0", {"sha256": "u"}, 10, 2)
    shell.feed(replace(awaited, **changes))
    assert shell.state.devices["c"].failures
    shell.feed(awaited)
    assert not shell.state.devices["c"].failures


def test_a_restart_forgets_neither_silence_nor_what_answers_took() -> None:
    shell = shell_of(Board(10.0), rounds=100)
    shell.run(rounds=3)
    shell.boards["c"].stalls = 0.0
    while not shell.state.devices["c"].excluded:
        shell.step()
    shell.boards["c"].is_present = False
    shell.crash()
    shell.later.clear()
    began = shell.now
    rounds = len(shell.state.history)
    shell.run(rounds=rounds + 10)  # the round under way has a new deadline, and the job doesn't wait for the device
    assert shell.now - began < 1100
    assert shell.state.devices["c"].answer_s


@pytest.mark.parametrize("fault", [{"stalls": 0.0}, {"uploads": False}])
def test_while_no_device_answers_the_fault_is_not_theirs(fault: dict[str, Any]) -> None:
    shell = shell_of(Board(1.0))
    shell.run(rounds=3)
    shell.boards |= {name: replace(board, **fault) for name, board in shell.boards.items()}
    while shell.now < 5 * shell.job.deadline_s:
        shell.step()
    assert not any(device.failures for device in shell.state.devices.values())


@pytest.mark.parametrize("schedule", [{}, ASYNCHRONOUS])
def test_no_device_is_excluded_while_nobody_is_heard(schedule: dict[str, object]) -> None:
    """One device has answered as the broker goes away for several deadlines, with all messages under way."""
    job = replace(JOB, rounds=2000, devices=4, deadline_s=1000, schedule=schedule)
    shell = announced_shell(job, {"a": Board(1.0), "b": Board(3.0), "c": Board(3.0), "d": Board(240.0)})
    shell.run(rounds=5)
    while not shell.state.tasks.count(Progress.FOLDED):
        shell.step()
    for board in shell.boards.values():
        board.stalls = 0.0
    shell.later = [later for later in sorted(shell.later) if isinstance(later[2], on.Ticked)]
    end = shell.now + 9 * job.deadline_s
    while shell.now < end:
        shell.step()
        assert not any(device.excluded for device in shell.state.devices.values())


def test_a_recipe_that_trains_longer_is_waited_for() -> None:
    shell = shell_of(Board(10.0))
    shell.run(rounds=3)
    shell.job = replace(shell.job, recipe=replace(shell.job.recipe, epochs=20 * shell.job.recipe.epochs))
    shell.recipe = shell.job.recipe.to_offer()
    for board in shell.boards.values():
        board.seconds *= 20
    shell.later.clear()
    shell.crash()
    shell.run(rounds=8)
    assert shell.counted_devices()[4:] == [["a", "b", "c"]] * 4


def test_a_new_device_is_waited_for_as_long_as_the_slowest_took() -> None:
    """What is predicted for it is a fraction of a second; what another took came late."""
    shell = shell_of(Board(1.0), rounds=4000)
    shell.run(rounds=3)
    shell.boards["c"].seconds = 300.0
    shell.boards["d"] = Board(290.0)
    while shell.state.devices["c"].answer_s["round"] < 300.0:
        shell.step()
    shell.feed(on.DeviceDied("c", shell.session))
    shell.feed(on.DeviceBorn("d", 1, profile_store.find_profile("raspberry-pi-5").to_dict(), 10))
    while "d" not in shell.counted_devices()[-1]:
        shell.step()
        assert not shell.state.devices["d"].failures


@pytest.mark.parametrize("works", [True, False])
def test_a_new_device_that_works_is_given_the_time_to_load_what_it_needs(works: bool) -> None:
    shell = shell_of(Board(1.0))
    shell.run(rounds=3)
    shell.boards["d"] = Board(50.0)
    shell.feed(on.DeviceBorn("d", 1, profile_store.find_profile("raspberry-pi-5").to_dict(), 10))
    while not any(name == "d" for _, name, _ in shell.offered):
        shell.step()
    number = shell.state.round
    if works:
        shell.feed(on.WorkReported("d", number, 1))
    shell.run(rounds=number)
    assert ("d" in shell.counted_devices()[-1]) is works


def test_a_silent_device_that_another_job_has_meanwhile_fails_no_further_rounds() -> None:
    shell = shell_of(Board(1.0), rounds=100)
    shell.run(rounds=3)
    shell.boards["c"].stalls = 0.0
    while not shell.state.devices["c"].silent_since:
        shell.step()
    failures = shell.state.devices["c"].failures
    shell.feed(on.DeviceDied("c", shell.session))
    shell.run(rounds=9)
    assert shell.state.devices["c"].failures == failures
