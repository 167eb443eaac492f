"""Ranks that hold for some rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune.strategies.channel_ranking import HELD, Held, Ranked
from fedprune.strategies.values import Memory, Scene
from support.fakes.strategy_rounds import NET, Play
from support.nets.drawn_models import model

pytestmark = pytest.mark.board


def scene(round_: int, seed: int, memory: Memory) -> Scene:
    return replace(Play(compose(Job()), model(NET, seed), {}).scene(), round=round_, memory=memory)


def learnt(scorer: Held, at: Scene) -> Memory:
    fold = compose(Job()).aggregator.fold(at, evidence=False)
    return dict(scorer.learn(at, fold, lambda: iter(())))


def test_ranks_hold_until_the_next_interval() -> None:
    held = Held(scorer="magnitude", interval=3, inputs="sum")
    memory = learnt(held, scene(1, 1, {}))
    own = [Ranked(scorer="magnitude", inputs="sum").rank(scene(1, seed, {})).ranks for seed in (1, 2)]
    assert any((a != b).any() for a, b in zip(*own, strict=True))
    for round_, want in ((2, 0), (3, 0), (4, 1)):
        found = held.rank(scene(round_, 2, memory)).ranks
        assert all((a == b).all() for a, b in zip(found, own[want], strict=True))


@pytest.mark.parametrize("sizes", [(6,), (5, 4)])
def test_ranks_of_another_description_of_the_model_do_not_hold(sizes: tuple[int, ...]) -> None:
    """A later version of the compiler may find other groups, of the same names."""
    held = Held(interval=5, inputs="sum")
    at = scene(2, 1, {})
    memory = {HELD: {f"{'0' * 64}/{g}": np.arange(n, dtype=np.int32) for g, n in enumerate(sizes)}}
    found = held.rank(replace(at, memory=memory)).ranks
    assert [len(r) for r in found] == list(NET.sizes)
