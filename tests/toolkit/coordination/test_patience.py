"""How long rounds wait for devices, by what their last answers took, and what becomes of those that are silent."""

from dataclasses import replace

import pytest

from fedprune.coordination import State
from support.fakes.timed_shell import Board, Timed, announced_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


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


@pytest.mark.parametrize("schedule", [{}, {"kind": "async", "arrivals": 3}])
def test_silence_is_remembered_excludes_and_is_forgiven(schedule: dict[str, object]) -> None:
    """Rounds take 2 s; the wait starts from an answer of 11 s, not from the deadline of 1,000 s."""
    shell = shell_of(Board(10.0), rounds=4000, schedule=schedule)
    shell.run(rounds=3)
    began = shell.now
    shell.boards["c"].stalls = 0.0
    while not (excluded := shell.state.devices["c"].excluded):
        shell.step()
    assert "no answer" in excluded
    rounds = len(shell.state.history)
    shell.run(rounds=rounds + 20)
    assert shell.now - began < (100 if not schedule else 4000)
    assert State.from_json(shell.state.to_json()) == shell.state
    shell.boards["c"].stalls = 2.0
    while "c" not in shell.counted_devices()[-1]:
        shell.run(rounds=len(shell.state.history) + 1)
    assert not shell.state.devices["c"].excluded


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


def test_while_no_device_answers_the_fault_is_not_theirs() -> None:
    shell = shell_of(Board(1.0))
    shell.run(rounds=3)
    for board in shell.boards.values():
        board.stalls = 0.0
    began = shell.now
    while shell.now < began + 1100:
        shell.step()
    assert not any(device.failures for device in shell.state.devices.values())
