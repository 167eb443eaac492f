"""Noise: normal, independent of how it is drawn, and secret unless a key says otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedprune.updates.privacy import GaussianNoise

pytestmark = pytest.mark.board

MANY = 200_000
DRAWN = GaussianNoise.keyed("the tests' own").draw(MANY)


def test_its_moments_are_those_of_a_standard_normal() -> None:
    # Five standard errors of each moment: the key is fixed, so that this holds for good or never.
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(DRAWN**power) - moment) < 5 * math.sqrt(spread / MANY), power


def test_its_distribution_is_a_standard_normals() -> None:
    ordered = np.sort(DRAWN)
    normal = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered])
    steps = np.arange(MANY + 1) / MANY
    gap = max(np.max(steps[1:] - normal), np.max(normal - steps[:-1]))
    assert gap < 1.95 / math.sqrt(MANY)  # Kolmogorov and Smirnov's statistic at 0.1 %


def test_deviates_are_not_correlated() -> None:
    for lag in (1, 2, MANY // 2, MANY // 2 + 1):
        assert abs(np.mean(DRAWN[lag:] * DRAWN[:-lag])) < 5 / math.sqrt(MANY - lag), lag


def test_a_key_gives_the_same_deviates_and_another_one_others() -> None:
    assert np.array_equal(GaussianNoise.keyed(1, "a").draw(9), GaussianNoise.keyed(1, "a").draw(9))
    assert not np.array_equal(GaussianNoise.keyed(1, "a").draw(9), GaussianNoise.keyed(1, "b").draw(9))
    assert not np.array_equal(GaussianNoise.secret().draw(9), GaussianNoise.secret().draw(9))
    source = GaussianNoise.keyed(2)
    assert not np.array_equal(source.draw(9), source.draw(9))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_as_many_are_drawn_as_are_asked_for(count: int) -> None:
    drawn = GaussianNoise.keyed(count).draw(count)
    assert drawn.shape == (count,)
    assert np.isfinite(drawn).all()


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        GaussianNoise(b"short")
