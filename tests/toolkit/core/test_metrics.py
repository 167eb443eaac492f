"""Metrics that devices report."""

import pytest

from fedprune.core.metrics import ACCURACY, LOSS

pytestmark = pytest.mark.board


def test_the_best_of_equals_is_the_first_and_what_was_not_measured_is_none() -> None:
    values = [None, 0.5, 0.7, 0.7, 0.5]
    assert (ACCURACY.best_index(values), LOSS.best_index(values)) == (2, 1)
    assert ACCURACY.best_index([None]) is None
