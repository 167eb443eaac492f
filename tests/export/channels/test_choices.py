"""Choices: options are tried in order until one leaves channels that could form a group."""

from __future__ import annotations

import numpy as np

from fedprune_export.channels.rule import Choices

ROW = np.array([1, 1, 2, 2])
TWO = np.array([0, 1, 2])  # units 1 and 2, each on its own
ONE = np.array([0, 1, 1])  # the same tied to each other
ALIKE, APART = np.array([0, 7, 7]), np.array([0, 7, 8])


def run(choices: Choices, options: str, unit: np.ndarray, footprint: np.ndarray = ALIKE) -> tuple[str | None, bool]:
    """One run of the rules over a single node."""
    choices.begin()
    option = choices.pick("node", list(options))
    if option is not None:
        choices.watch("node", option, [ROW])
    return option, choices.advance(unit, footprint)


def test_an_option_that_leaves_two_channels_stays() -> None:
    choices = Choices()
    assert run(choices, "abc", TWO) == ("a", False)
    assert run(choices, "abc", TWO) == ("a", False)


def test_the_finest_comes_first_where_it_is_preferred_and_options_are_not_ranked() -> None:
    assert run(Choices("fine"), "abc", TWO) == ("c", False)
    assert Choices("fine").pick("node", ["a", "b"], ranked=True) == "a"


def test_an_option_that_ties_all_channels_is_advanced() -> None:
    choices = Choices()
    assert [run(choices, "ab", ONE)[0] for _ in range(2)] == ["a", "b"]


def test_channels_that_can_never_be_one_group_do_not_count() -> None:
    choices = Choices()
    assert run(choices, "ab", TWO, APART) == ("a", True)
    assert run(choices, "ab", TWO, ALIKE) == ("b", False)


def test_options_get_a_second_round_and_no_third() -> None:
    """A choice may have failed because of another one's, which has been advanced since."""
    choices = Choices()
    picked, again = [], True
    while again:
        option, again = run(choices, "ab", ONE)
        picked.append(option)
    assert picked == ["a", "b", None, "a", "b", None]


def test_what_had_failed_may_fit_later() -> None:
    choices = Choices()
    for _ in range(3):
        run(choices, "ab", ONE)
    assert run(choices, "ab", TWO) == ("a", False)
