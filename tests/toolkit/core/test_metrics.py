"""Metrics that devices report."""

from __future__ import annotations

import pytest

from fedprune.core.metrics import served

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
