"""Rounds in which only so many devices work at a time: the others wait for their turn, and nobody holds up the line."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import events as on
from support.fakes.timed_shell import Board, Timed, announced_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


def shell_of(boards: dict[str, Board], in_flight: int, **settings: object) -> Timed:
    changes = {"devices": len(boards), "rounds": 2, "in_flight": in_flight, **settings}
    return announced_shell(replace(JOB, **changes), boards)  # type: ignore[arg-type]


def fleet(count: int) -> dict[str, Board]:
    return {f"d{i:02}": Board() for i in range(count)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 14))
def test_no_more_work_at_a_time_and_all_count(count: int, in_flight: int) -> None:
    shell = shell_of(fleet(count), in_flight)
    shell.run()
    assert shell.counted_devices() == [sorted(shell.boards)] * 2
    assert shell.max_parts_in_flight == min(count, in_flight or count)


def test_everybody_has_the_deadline_for_its_own_offer() -> None:
    boards = fleet(9)
    for name in list(boards)[:3]:
        boards[name].stalls = 0.0
    shell = shell_of(boards, 3, rounds=1)
    shell.run()
    assert shell.counted_devices() == [sorted(boards)[3:]]
    assert set(shell.reasons(1).values()) == {"the deadline has passed"}
    # The three in front are given up at their own deadline, which is not the others'.
    assert JOB.deadline_s < shell.now <= JOB.deadline_s + 2 * 11 + JOB.deadline_s / 20


def test_who_is_away_lets_the_others_go_first() -> None:
    shell = shell_of(fleet(6), 2, rounds=1)
    while not shell.offered:
        shell.step()
    shell.feed(on.DeviceDied("d02", shell.session))
    while "d05" not in [n for _, n, _ in shell.offered]:
        shell.step()
    assert "d02" not in [n for _, n, _ in shell.offered]
    shell.run()
    assert "d02" in shell.counted_devices()[0]
