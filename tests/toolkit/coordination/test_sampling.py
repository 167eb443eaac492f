"""Who is asked: as many as the job says, by lot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination.stragglers import beyond, places
from support.fakes.timed_shell import Board, begun
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


@given(st.integers(1, 30), st.floats(0.01, 1, allow_nan=False), st.floats(0, 3))
def test_a_round_asks_at_least_one_device_and_at_most_all(ready: int, share: float, more: float) -> None:
    count = places(share, ready)
    asked = beyond(count, more, ready)
    assert 1 <= count <= asked <= ready
    assert share * ready <= count + 1e-6 < share * ready + 1 + 2e-6 or count == 1


def test_every_round_draws_other_devices_and_the_same_ones_again_with_the_same_seed() -> None:
    rounds = []
    for seed in (7, 7, 8):
        job = replace(JOB, seed=seed, rounds=30, devices=6, participation=0.5)
        shell = begun(job, {f"d{i}": Board() for i in range(6)})
        shell.run()
        asked = [frozenset(n for r, n, _ in shell.offered if r == number) for number in range(1, 31)]
        assert {len(names) for names in asked} == {3}
        rounds.append(asked)
    assert rounds[0] == rounds[1] != rounds[2]
    assert len(set(rounds[0])) > 10
    assert set().union(*rounds[0]) == {f"d{i}" for i in range(6)}
