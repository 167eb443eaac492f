"""Two boards of one name are noticed, and one board that is only restarted is not."""

from __future__ import annotations

from fedprune_server.devices.clone_detection import (
    AGAIN_S,
    APART_S,
    MANY,
    QUIET_S,
    SIGNS,
    SIGNS_WITHIN_S,
    CloneDetector,
)

PI, NANO = ("pi", 300), ("nano", 80)


def test_another_board_beside_a_connected_one_is_noticed() -> None:
    names = CloneDetector()
    assert names.born("a", 1, PI, False, 0.0) == ""
    assert names.born("a", 2, NANO, True, 1.0) == "first it was a pi with 300 samples, now it is a nano with 80 samples"
    assert names.suspects("a")


def test_boards_that_take_turns_are_noticed() -> None:
    names = CloneDetector()
    for session, what in enumerate((PI, NANO)):
        assert names.born("a", session, what, False, float(session)) == ""
    assert "first it was a nano" in names.born("a", 2, PI, False, 2.0)


def test_boards_that_look_alike_are_noticed_by_how_often_they_connect() -> None:
    names = CloneDetector()
    said = [names.born("a", n, PI, False, float(n)) for n in range(MANY + 1)]
    assert said[-1] == f"it has connected {MANY} times within {MANY - 1} s"
    assert not any(said[:-1])


def test_a_board_that_is_restarted_with_other_data_is_not_suspected() -> None:
    names = CloneDetector()
    names.born("a", 1, PI, False, 0.0)
    assert names.born("a", 2, ("pi", 301), False, 10.0) == ""
    assert not names.suspects("a")


def test_a_board_that_comes_back_now_and_then_is_not_suspected() -> None:
    names = CloneDetector()
    assert not any(names.born("a", n, PI, True, 60.0 * n) for n in range(50))


def test_an_announcement_that_is_repeated_means_nothing() -> None:
    names = CloneDetector()
    assert not any(names.born("a", 1, PI, True, 0.1 * n) for n in range(50))


def test_a_suspicion_is_told_once_and_settles() -> None:
    names = CloneDetector()
    said = [names.born("a", n, (PI, NANO)[n % 2], True, float(n)) for n in range(9)]
    assert [bool(s) for s in said] == [False, True, *[False] * 7]
    names.settle(8.0 + QUIET_S)
    assert not names.suspects("a")
    assert names.born("a", 9, NANO, True, 1.0 + AGAIN_S)


def test_more_samples_are_no_sign_of_another_board() -> None:
    names = CloneDetector()
    names.born("a", 1, ("pi", 300), False, 0.0)
    names.born("a", 1, ("pi", 320), True, 5.0)
    assert names.born("a", 2, ("pi", 330), True, 10.0) == ""
    assert names.born("a", 3, ("pi", 20), True, 20.0) != ""


def test_a_connection_that_speaks_again_after_another_one_is_a_second_board() -> None:
    names = CloneDetector()
    assert names.born("a", 5, PI, False, 0.0) == ""
    assert names.born("a", 6, PI, True, 1.0) == ""
    assert names.born("a", 5, PI, True, 2.0) == "two connections take turns"
    names.forget("a")
    assert names.born("a", 1, PI, True, 3.0) == ""


def test_a_connection_that_outlives_another_one_is_no_news() -> None:
    names = CloneDetector()
    names.born("a", 5, PI, False, 0.0)
    names.born("a", 6, PI, True, 1.0)
    assert names.born("a", 5, PI, False, 2.0) == ""


def test_signs_that_come_at_once_or_seldom_are_no_proof_of_a_copy() -> None:
    """As a broker gives them that lets messages overtake each other when a board reconnects."""
    names = CloneDetector()
    for burst in range(50):
        assert not any(names.doubled("a", 1e4 + burst * SIGNS_WITHIN_S + 0.01 * n) for n in range(20))
    assert not names.suspects("a")


def test_signs_that_go_on_are_told_once() -> None:
    names = CloneDetector()
    told = [names.doubled("a", 1.0 + n * APART_S) for n in range(3 * SIGNS)]
    assert told == [n == SIGNS - 1 for n in range(3 * SIGNS)]
    assert names.suspects("a")
    assert not names.suspects("b")
    names.forget("a")
    assert not names.doubled("a", 1e6)
