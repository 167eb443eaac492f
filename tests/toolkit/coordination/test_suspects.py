"""A board that spoils secure sums is found in a number of attempts that grows with the logarithm of the fleet."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.suspects import divide_into_cohorts, narrow_suspects
from fedprune.jobs.failure_kind import FailureKind
from fedprune.secure_aggregation.session import MIN_BOARDS
from support.fakes import tiny_job
from support.fakes.coordinator_shell import MaskingShell

pytestmark = pytest.mark.board


def board_names(count: int) -> list[str]:
    return [f"b{i:02}" for i in range(count)]


def attempts(boards: list[str], hostile: set[str], seed: int, max_attempts: int) -> tuple[int, int, set[str]]:
    """Divide and sum until a board is named: attempts, false sums of the first hostile board, and those named."""
    suspects: list[list[str]] = []
    false_sums, culprit = 0, min(hostile)
    for attempt in range(1, max_attempts + 1):
        cohorts, _ = divide_into_cohorts(boards, suspects, np.random.default_rng([seed, attempt]))
        false = [cohort for cohort in cohorts if hostile & set(cohort)]
        false_sums += any(culprit in cohort for cohort in false)
        suspects, at_fault = narrow_suspects(suspects, [c for c in cohorts if c not in false], false)
        if at_fault:
            return attempt, false_sums, at_fault
    return max_attempts, false_sums, set()


@given(st.integers(6, 60), st.data())
@settings(deadline=None, max_examples=60)
def test_one_board_is_named_after_a_logarithm_of_false_sums(count: int, data: st.DataObject) -> None:
    boards = board_names(count)
    hostile = data.draw(st.sampled_from(boards))
    _, false_sums, at_fault = attempts(boards, {hostile}, data.draw(st.integers(0, 99)), 100)
    assert at_fault == {hostile}
    assert false_sums <= 1 + (count - 1).bit_length()


@given(st.integers(8, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_of_several_boards_only_hostile_ones_are_named(count: int, data: st.DataObject) -> None:
    boards = board_names(count)
    hostile = data.draw(st.sets(st.sampled_from(boards), min_size=2, max_size=count // 4))
    assert set() < attempts(boards, hostile, data.draw(st.integers(0, 99)), 50)[2] <= hostile


def test_boards_of_halves_that_are_all_too_small_are_mixed_anew() -> None:
    hostile = {f"b{i:02}" for i in (0, 1, 11, 13, 20, 25, 26, 31)}
    assert set() < attempts(board_names(32), hostile, 25, 50)[2] <= hostile
    assert narrow_suspects([["a"], ["b"], ["c"], ["d"]], [], ["ac", "bd"])[0] == [["a"], ["b"], ["c"], ["d"]]


@given(st.integers(3, 30), st.data())
@settings(deadline=None, max_examples=60)
def test_each_board_is_in_one_cohort_of_enough_boards_or_left_out(count: int, data: st.DataObject) -> None:
    boards = board_names(count)
    pool, suspects = list(boards), list[list[str]]()
    for size in data.draw(st.lists(st.integers(1, 12), max_size=3)):
        suspects.append(pool[:size])
        del pool[:size]
    cohorts, left = divide_into_cohorts(boards, [group for group in suspects if group], np.random.default_rng(count))
    assert sorted([*left, *(name for cohort in cohorts for name in cohort)]) == boards
    assert cohorts
    assert all(len(cohort) >= MIN_BOARDS for cohort in cohorts)


class SpoiltSums(MaskingShell):
    """Five boards whose sums are all false."""

    def __init__(self) -> None:
        super().__init__(replace(tiny_job.JOB, devices=5, secure_aggregation=True))
        self.session = 0
        self.divisions: list[do.SumMasked] = []

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [on.DeviceBorn(name, self.session, {"name": "toy"}, 10) for name in board_names(5)]

    def answer(self, command: do.Command) -> on.Event | None:
        if isinstance(command, do.SumMasked):
            self.divisions.append(command)
            return on.Unmasked(command.round, [], {}, [], false=[[*cohort] for cohort in command.cohorts])
        return super().answer(command)

    def left_out(self) -> set[str]:
        return {name for name, task in self.state.tasks.items() if task.kind == FailureKind.LEFT_OUT}


def test_a_restart_while_masked_updates_are_summed_leaves_out_no_more_boards_than_before() -> None:
    fleet = SpoiltSums()
    fleet.arrive()
    while not fleet.left_out():
        fleet.feed(fleet.inbox.pop(0))
    left_out, division = fleet.left_out(), fleet.divisions[-1]
    fleet.crash()
    fleet.crash()
    assert fleet.divisions[-2:] == [division, division]
    assert fleet.left_out() == left_out

    # The next attempt asks all boards again and divides them anew.
    fleet.feed(on.Unmasked(division.round, [], {}, [], false=[[*cohort] for cohort in division.cohorts]))
    while fleet.divisions[-1] == division:
        fleet.feed(fleet.inbox.pop(0))
    assert fleet.left_out() | {name for cohort in fleet.divisions[-1].cohorts for name in cohort} == {*board_names(5)}
