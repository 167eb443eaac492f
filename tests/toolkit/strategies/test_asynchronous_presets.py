"""FedAsync, FedFix, FedBuff and PR-FL as composed: what their options mean, and PR-FL's worked examples."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ConfigError
from fedprune.strategies import compose
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.element_masks import MaskedElements
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.time_driven import TimeDriven
from fedprune.strategies.values import Turn
from support.fakes.tiny_job import ARCHITECTURE, JOB

pytestmark = pytest.mark.board


def strategy_of(name: str, **options: Any) -> Strategy:
    return compose(replace(JOB, density=0.0, strategy=name, options=options))


def turn_in(number: int, last: int = 0) -> Turn:
    return Turn(0, number, "a", ARCHITECTURE.sizes, last_counted_round=last)


def reporting_offers(strategy: Strategy, offers: Iterable[int]) -> list[int]:
    """Of a device's offers, by their rounds, those that ask for squared gradients, where every update counts."""
    numbers, last = [], 0
    for number in offers:
        if strategy.recipe(JOB.recipe, turn_in(number, last)).report_squares:
            numbers.append(number)
        last = number
    return numbers


def test_pr_fl_by_elements_and_by_channels() -> None:
    elements, channels = strategy_of("pr-fl"), strategy_of("pr-fl", masks="channels")
    assert isinstance(elements, MaskedElements)
    assert isinstance(channels, RankedChannels)
    assert isinstance(elements.allocator, TimeDriven)
    assert isinstance(channels.allocator, TimeDriven)
    assert elements.allocator.start.masks_elements
    assert not channels.allocator.start.masks_elements
    recipe = JOB.recipe
    assert reporting_offers(elements, range(1, 101)) == [1, *range(46, 51), 51, *range(96, 101)]
    assert reporting_offers(strategy_of("pr-fl", reported=1.0, interval=7), range(1, 15)) == [*range(1, 15)]
    assert reporting_offers(strategy_of("pr-fl", reported=0.0, interval=7), range(1, 15)) == [1, 8]
    assert not channels.recipe(recipe, turn_in(50)).report_squares


@given(st.lists(st.integers(1, 130), min_size=1, max_size=60), st.sampled_from([0.0, 0.1]))
def test_every_device_reports_squares_once_an_interval_however_slow_it_is(gaps: list[int], reported: float) -> None:
    """Of every interval in which it gets an offer, one asks it; hardly more do than the interval's last ones."""
    offers = np.cumsum([1, *gaps]).tolist()
    offer_numbers = reporting_offers(strategy_of("pr-fl", reported=reported), offers)
    early = [n for n in offer_numbers if (n - 1) % 50 < 50 * (1 - reported)]
    assert {(n - 1) // 50 for n in offer_numbers} == {(n - 1) // 50 for n in offers}
    assert len({(n - 1) // 50 for n in early}) == len(early), "one of them before its last rounds"


def test_whose_update_did_not_count_is_asked_again() -> None:
    strategy = strategy_of("pr-fl")
    recipes = [strategy.recipe(JOB.recipe, turn_in(n, last=3)) for n in (51, 60)]
    assert [r.report_squares for r in recipes] == [True, True]
    assert not strategy.recipe(JOB.recipe, turn_in(60, last=51)).report_squares


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedbuff", {"buffer": 5, "concurrent": 3}, "at most concurrent"),
        ("pr-fl", {"floor": 0.0}, "floor"),
        ("pr-fl", {"synchronous": True, "keep": False}, "keep"),
        ("pr-fl", {"synchronous": True, "window_s": 2, "masks": "channels"}, "window_s"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strategy_of(name, **options)
