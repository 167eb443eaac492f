"""Deadlines from progress: who is too slow is given up early, and who goes on is waited for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination import events as on
from fedprune.coordination.stragglers import LOOKS, MAX_CUTS, PARTS, SILENT, SLOW, Pace, news, note, share_of
from fedprune.jobs.state import Progress, State, Task
from support.fakes.timed_shell import Board, Timed, begun
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board

DEADLINE_S = 1000.0
LOOK_S = DEADLINE_S / LOOKS


def shell_of(boards: dict[str, Board], **settings: object) -> Timed:
    changes = {"devices": len(boards), "rounds": 1, "deadline_s": DEADLINE_S, "pace": 2.0, **settings}
    return begun(replace(JOB, **changes), boards)  # type: ignore[arg-type]


def fleet(*odd: Board) -> dict[str, Board]:
    """Five boards that take 100 seconds, and odd ones."""
    return {f"d{i}": b for i, b in enumerate([Board(100.0)] * 5 + list(odd))}


def test_without_a_pace_a_round_waits_for_its_deadline() -> None:
    shell = shell_of(fleet(Board(100.0, stalls=0.5)), pace=0.0)
    shell.run()
    assert shell.reasons(1) == {"d5": "the deadline has passed"}
    assert shell.now == DEADLINE_S


def test_a_device_that_will_be_too_slow_is_given_up_when_that_is_known() -> None:
    shell = shell_of(fleet(Board(900.0)))
    shell.run()
    assert shell.reasons(1) == {"d5": SLOW}
    assert ("d5", 1, SLOW) in shell.cancelled
    # Half of the devices are in after 101 seconds, and by then it has told that it needs 900.
    assert 101 <= shell.now <= 101 + LOOK_S


def test_a_device_that_goes_on_in_time_is_waited_for() -> None:
    shell = shell_of(fleet(Board(190.0)))
    shell.run()
    assert shell.reasons(1) == {}
    assert shell.now == 191


def test_a_long_download_is_not_taken_for_slow_training() -> None:
    shell = shell_of(fleet(Board(100.0, download_s=95.0)))
    shell.run()
    assert shell.reasons(1) == {}


def test_a_device_that_tells_nothing_has_what_the_round_bears() -> None:
    shell = shell_of(fleet(Board(900.0, tells=False)))
    shell.run()
    assert shell.reasons(1) == {"d5": SLOW}
    assert 202 < shell.now <= 202 + LOOK_S


def test_a_device_that_stops_is_given_up_before_the_others_are_in() -> None:
    boards = {f"d{i}": Board(600.0) for i in range(4)} | {"d4": Board(600.0, stalls=0.3)}
    shell = shell_of(boards)
    shell.run()
    assert shell.reasons(1) == {"d4": SILENT}
    # The next tenth should have taken 60 seconds, and 120 would be borne.
    assert shell.now == 601


def test_silence_is_noticed_after_a_few_of_its_own_steps() -> None:
    boards = {f"d{i}": Board(900.0, stalls=0.2) for i in range(3)}
    shell = shell_of(boards)
    while not shell.cancelled and shell.now < DEADLINE_S:
        shell.step()
    told = 1 + 900 * 0.2
    assert told + 180 < shell.now <= told + 180 + LOOK_S


def test_who_has_trained_may_take_its_time_with_the_rest() -> None:
    pace = Pace(2.0, DEADLINE_S)
    task = Task(1, (8,), progress=Progress.OFFERED, offered_at=0.0, first_report=[1.0, 0.0], latest_report=[100.0, 1.0])
    assert pace.verdict(task, math.inf, 900.0) == ""
    task.progress = Progress.PULLING
    assert pace.verdict(task, 1.0, 900.0) == ""


def test_nobody_is_too_slow_before_half_of_the_devices_are_in() -> None:
    pace = Pace(3.0, DEADLINE_S)
    tasks = [Task(1, (8,), trained_s=s) for s in (100.0, 200.0, None, None)]
    assert pace.bears(tasks[1:]) == math.inf
    assert pace.bears(tasks) == 600
    assert pace.bears([replace(t, trained_s=t.trained_s and 1.0) for t in tasks]) == LOOK_S


def test_nothing_is_concluded_from_before_a_restart() -> None:
    task = Task(1, (8,), progress=Progress.OFFERED, offered_at=None, first_report=[0.0, 0.0], latest_report=[1.0, 0.1])
    assert Pace(2.0, DEADLINE_S).verdict(task, 10.0, 900.0) == ""


def test_a_slow_board_is_waited_for_when_it_was_given_up_often() -> None:
    shell = shell_of(fleet(Board(900.0)), rounds=2 * MAX_CUTS + 2)
    shell.run()
    assert [r for r, c in enumerate(shell.counted(), 1) if "d5" in c] == [MAX_CUTS + 1, 2 * MAX_CUTS + 2]
    assert shell.state.devices["d5"].failures == 0


@pytest.mark.parametrize(
    ("report", "share"),
    [
        (("train", 3, 4), 0.75),
        (("train", 9, 4), 1.0),
        (("train", 0, 0), None),
        (("download", 1, 2), None),
        (("evaluate", 0, 2), None),
        (("evaluate", 1, 2), 1.0),
    ],
)
def test_what_a_report_says_of_training(report: tuple[str, int, int], share: float | None) -> None:
    assert share_of(*report) == share


@given(st.lists(st.floats(0, 1), max_size=200))
def test_a_device_is_news_once_for_every_tenth(shares: list[float]) -> None:
    task, told = Task(1, (8,), progress=Progress.OFFERED), 0
    for now, share in enumerate(shares):
        told += news(task, share)
        note(task, share, float(now))
    assert told <= PARTS + 1
    if shares:
        assert task.latest_report is not None
        assert math.floor(PARTS * task.latest_report[1]) == max(math.floor(PARTS * s) for s in shares)


def test_reports_of_others_parts_and_of_earlier_ones_are_nothing() -> None:
    shell = shell_of(fleet())
    while not shell.offered or shell.inbox:
        shell.feed(shell.inbox.pop(0))
    before = shell.state.to_json()
    for event in (
        on.Progressed("d0", 1, 2, 0.5),
        on.Progressed("d0", 2, 1, 0.5),
        on.Progressed("stranger", 1, 1, 0.5),
    ):
        shell.feed(event)
    assert shell.state.to_json() == before
    shell.feed(on.Progressed("d0", 1, 1, 0.5))
    assert shell.state.tasks["d0"].latest_report == [shell.now, 0.5]
    assert State.from_json(shell.state.to_json()) == shell.state
