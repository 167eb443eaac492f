"""When a board repeats what the server has not answered."""

from __future__ import annotations

import random

import pytest

from fedprune_device.network.uplink import ANNOUNCE_S, Backoff

pytestmark = pytest.mark.board


def test_pauses_do_not_depend_on_a_seed_of_the_user_s_program() -> None:
    found = set()
    for _ in range(4):
        random.seed(0)
        backoff = Backoff()
        assert backoff.due(0.0)
        assert 0.75 * ANNOUNCE_S <= backoff.at <= 1.25 * ANNOUNCE_S
        found.add(backoff.at)
    assert len(found) == 4
