"""When a board repeats what the server has not answered."""

import random

import pytest

from fedprune_device.network.backoff import MIN_ANNOUNCE_INTERVAL_S, Backoff

pytestmark = pytest.mark.board


def test_pauses_do_not_depend_on_a_seed_of_the_user_s_program() -> None:
    times = set()
    for _ in range(4):
        random.seed(0)
        backoff = Backoff()
        assert backoff.take_if_due(0.0)
        assert 0.75 * MIN_ANNOUNCE_INTERVAL_S <= backoff.next_at <= 1.25 * MIN_ANNOUNCE_INTERVAL_S
        times.add(backoff.next_at)
    assert len(times) == 4
