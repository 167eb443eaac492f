"""Two boards of one name are noticed, and one board that is only restarted is not."""

import pytest

from fedprune_server.devices.clone_detection import (
    MAX_RECONNECTS,
    MIN_OVERLAPS,
    OVERLAP_INTERVAL_S,
    OVERLAP_WINDOW_S,
    REPORT_INTERVAL_S,
    SUSPICION_QUIET_S,
    CloneDetector,
)

PI, NANO = ("pi", 300), ("nano", 80)

Births = list[tuple[int, tuple[str, int], bool, float]]
"""Session, description, whether the one before is still connected, and when."""

TWO_BOARDS: dict[str, tuple[Births, str]] = {
    "another beside a connected one": (
        [(1, PI, False, 0.0), (2, NANO, True, 1.0)],
        "first it was a pi with 300 samples, now it is a nano with 80 samples",
    ),
    "taking turns": ([(0, PI, False, 0.0), (1, NANO, False, 1.0), (2, PI, False, 2.0)],
                     "first it was a nano with 80 samples, now it is a pi with 300 samples"),
    "connecting often": (
        [(n, PI, False, float(n)) for n in range(MAX_RECONNECTS + 1)],
        f"it has connected {MAX_RECONNECTS} times within {MAX_RECONNECTS - 1} s",
    ),
    "a connection that speaks again after another one": (
        [(5, PI, False, 0.0), (6, PI, True, 1.0), (5, PI, True, 2.0)],
        "two connections take turns",
    ),
    "fewer samples": (
        [(1, PI, False, 0.0), (2, ("pi", 20), True, 20.0)],
        "first it was a pi with 300 samples, now it is a pi with 20 samples",
    ),
}  # fmt: skip
ONE_BOARD: dict[str, Births] = {
    "restarted with other data": [(1, PI, False, 0.0), (2, ("pi", 301), False, 10.0)],
    "back now and then": [(n, PI, True, 60.0 * n) for n in range(50)],
    "an announcement that is repeated": [(1, PI, True, 0.1 * n) for n in range(50)],
    "more samples": [(1, PI, False, 0.0), (1, ("pi", 320), True, 5.0), (2, ("pi", 330), True, 10.0)],
    "a connection that outlives another one": [(5, PI, False, 0.0), (6, PI, True, 1.0), (5, PI, False, 2.0)],
}


@pytest.mark.parametrize("case", TWO_BOARDS)
def test_two_boards_of_one_name_are_noticed(case: str) -> None:
    births, reason = TWO_BOARDS[case]
    names = CloneDetector()
    assert [names.note_birth("a", *birth) for birth in births] == [""] * (len(births) - 1) + [reason]
    assert names.is_suspected("a")
    names.forget("a")
    assert names.note_birth("a", 1, PI, True, 30.0) == ""


@pytest.mark.parametrize("case", ONE_BOARD)
def test_one_board_is_not_suspected(case: str) -> None:
    names = CloneDetector()
    assert not any(names.note_birth("a", *birth) for birth in ONE_BOARD[case])
    assert not names.is_suspected("a")


def test_a_suspicion_is_told_once_and_settles() -> None:
    names = CloneDetector()
    suspicions = [names.note_birth("a", n, (PI, NANO)[n % 2], True, float(n)) for n in range(9)]
    assert [bool(s) for s in suspicions] == [False, True, *[False] * 7]
    names.expire(8.0 + SUSPICION_QUIET_S)
    assert not names.is_suspected("a")
    assert names.note_birth("a", 9, NANO, True, 1.0 + REPORT_INTERVAL_S)


def test_signs_that_come_at_once_or_seldom_are_no_proof_of_a_copy() -> None:
    """As a broker gives them that lets messages overtake each other when a board reconnects."""
    names = CloneDetector()
    for burst in range(50):
        assert not any(names.note_shared_key("a", 1e4 + burst * OVERLAP_WINDOW_S + 0.01 * n) for n in range(20))
    assert not names.is_suspected("a")


def test_signs_that_go_on_are_told_once() -> None:
    names = CloneDetector()
    suspicions = [names.note_shared_key("a", 1.0 + n * OVERLAP_INTERVAL_S) for n in range(3 * MIN_OVERLAPS)]
    assert suspicions == [n == MIN_OVERLAPS - 1 for n in range(3 * MIN_OVERLAPS)]
    assert names.is_suspected("a")
    assert not names.is_suspected("b")
    names.forget("a")
    assert not names.note_shared_key("a", 1e6)
