"""Metrics that devices report."""

from __future__ import annotations

import pytest

from fedprune.core.metrics import ACCURACY, LOSS, served

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("metrics", "accuracy"),
    [
        ({"accuracy_before": 0.5, "accuracy_after": 0.7}, 0.7),
        ({"accuracy_before": 0.5, "accuracy_after": 0.7, "accuracy_average": 0.6}, 0.6),
        ({"accuracy_before": 0.5, "loss_after": 0.7}, None),
    ],
)
def test_what_serves_is_the_average_where_there_is_one(metrics: dict[str, float], accuracy: float | None) -> None:
    assert served(metrics, "accuracy") == accuracy


def test_the_best_of_equals_is_the_first_and_what_was_not_measured_is_none() -> None:
    values = [None, 0.5, 0.7, 0.7, 0.5]
    assert (ACCURACY.best_index(values), LOSS.best_index(values)) == (2, 1)
    assert ACCURACY.best_index([None]) is None
