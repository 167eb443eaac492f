"""Who is asked: by lot, and by turns, in which nobody is forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination.quotas import DIMENSIONS, Quotas
from fedprune.coordination.stragglers import beyond, drawn, places
from fedprune.core.rng import keyed
from support.fakes.timed_shell import Board, begun
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=30, unique=True)
SHARES = st.floats(0.01, 1, allow_nan=False)


def named(order: Sequence[str], offered: Mapping[str, int], count: int, fairness: float) -> list[str]:
    """Names of the devices that a round asks, of those in a random order."""
    free = Quotas({}).places(np.zeros((DIMENSIONS, len(order)), np.int64), count)
    found = drawn(np.array([offered[n] for n in order], np.int64), count, fairness, free)
    return [order[i] for i in found.tolist()]


@given(st.data(), NAMES, SHARES, st.floats(0, 1), st.floats(0, 3))
def test_as_many_different_devices_are_drawn_as_are_asked_for(
    data: st.DataObject, names: list[str], share: float, fairness: float, more: float
) -> None:
    count = places(share, len(names))
    asked = beyond(count, more, len(names))
    assert 1 <= count <= asked <= len(names)
    waited = {n: data.draw(st.integers(0, 5)) for n in names}
    found = named(names, waited, asked, fairness)
    assert len(found) == len(set(found)) == asked
    assert set(found) <= set(names)


@given(NAMES, SHARES)
def test_without_fairness_the_lot_alone_decides(names: list[str], share: float) -> None:
    count = places(share, len(names))
    assert named(names, dict.fromkeys(names, 0), count, 0.0) == names[:count]


@given(st.data(), NAMES)
def test_places_by_turn_go_to_those_who_have_waited_longest(data: st.DataObject, names: list[str]) -> None:
    waited = {n: data.draw(st.integers(0, 5)) for n in names}
    count = data.draw(st.integers(1, len(names)))
    found = named(names, waited, count, 1.0)
    assert max(waited[n] for n in found) <= min((waited[n] for n in names if n not in found), default=5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), SHARES, st.floats(0.05, 1), st.integers(0, 9))
def test_no_device_that_stays_waits_for_longer_than_its_turn(
    count: int, participation: float, fairness: float, seed: int
) -> None:
    names = [f"d{i}" for i in range(count)]
    rounds = 4 * count + 8
    shell = begun(
        replace(JOB, seed=seed, rounds=rounds, devices=count, participation=participation, fairness=fairness),
        {n: Board() for n in names},
    )
    shell.run()
    bound = math.ceil(1 / (fairness * participation) - 1e-9)
    for name in names:
        asked = [0, *(r for r, n, _ in shell.offered if n == name)]
        waits = [b - a for a, b in zip(asked, [*asked[1:], rounds + 1], strict=True)]
        assert max(waits) <= bound


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 9), st.integers(1, 3), st.integers(0, 9))
def test_nobody_has_two_turns_before_one_who_stays(data: st.DataObject, count: int, room: int, seed: int) -> None:
    """Whoever else comes and goes, and whatever the lot says."""
    asked = dict.fromkeys([f"d{i}" for i in range(count)], 0)
    turns: dict[str, int] = {}
    for number in range(1, 3 * count):
        ready = ["d0", *data.draw(st.lists(st.sampled_from(sorted(asked)[1:]), unique=True))]
        order = keyed(seed, number).permutation(len(ready))
        chosen = named([ready[i] for i in order], asked, min(room, len(ready)), 1.0)
        asked |= dict.fromkeys(chosen, number)
        turns = {} if "d0" in chosen else {n: turns.get(n, 0) + (n in chosen) for n in asked}
        assert max(turns.values(), default=0) <= 1


def test_who_comes_new_waits_behind_those_who_wait() -> None:
    boards = {f"d{i}": Board() for i in range(4)}
    shell = begun(replace(JOB, rounds=8, devices=4, participation=0.25, fairness=1), boards)
    shell.run(rounds=2)
    boards |= {f"n{i}": Board() for i in range(4)}
    shell.arrive()
    shell.run()
    asked = [n for _, n, _ in shell.offered]
    first = asked.index(next(n for n in asked if n.startswith("n")))
    assert set(asked[:first]) == {"d0", "d1", "d2", "d3"}


def test_turns_change_nothing_where_everybody_is_asked() -> None:
    models = []
    for fairness in (0.0, 1.0):
        shell = begun(replace(JOB, fairness=fairness), {n: Board() for n in "abc"})
        shell.run()
        models.append([h["model"] for h in shell.state.history])
    assert models[0] == models[1]


def test_a_device_that_never_answers_does_not_keep_its_turn() -> None:
    boards = {f"d{i}": Board(stalls=0.0 if i == 0 else 2.0, tells=False) for i in range(5)}
    shell = begun(replace(JOB, rounds=10, devices=5, participation=0.2, fairness=1), boards)
    shell.run()
    asked = [n for _, n, _ in shell.offered]
    assert 2 <= asked.count("d0") <= 3
    assert all("d0" not in c for c in shell.counted())
