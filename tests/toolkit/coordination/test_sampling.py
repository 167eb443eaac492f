"""Who is asked: as many as the job says, by lot."""

from dataclasses import replace

import pytest

from support.fakes.timed_shell import Board, announced_shell
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


def test_every_round_draws_other_devices_and_the_same_ones_again_with_the_same_seed() -> None:
    rounds = []
    for seed in (7, 7, 8):
        job = replace(JOB, seed=seed, rounds=30, devices=6, participation=0.5)
        shell = announced_shell(job, {f"d{i}": Board() for i in range(6)})
        shell.run()
        asked = [frozenset(n for r, n, _ in shell.offered if r == number) for number in range(1, 31)]
        assert {len(names) for names in asked} == {3}
        rounds.append(asked)
    assert rounds[0] == rounds[1] != rounds[2]
    assert len(set(rounds[0])) > 10
    assert set().union(*rounds[0]) == {f"d{i}" for i in range(6)}
