"""Ranks that hold for some rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune.strategies.channel_ranking import Held, Ranked
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
