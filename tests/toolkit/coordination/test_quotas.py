"""Quotas hold in every round, cost no place that others could have, and change nothing where there are none."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import events as on
from fedprune.coordination.availability import WORKING
from fedprune.coordination.quotas import DIMENSIONS, Quotas, apportioned
from fedprune.coordination.stragglers import drawn
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, Phase
from support.fakes.asynchronous_shell import job_of
from support.fakes.timed_shell import Board, Timed
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board

Integers = npt.NDArray[np.int64]

HARDWARE, REGIONS = ("pi", "jetson", "x86"), ("", "north", "south")
SHARES = st.lists(st.floats(0, 1), max_size=5)
QUOTAS = st.fixed_dictionaries(
    {},
    optional={f"hardware:{n}": st.floats(0, 1) for n in HARDWARE[:2]}
    | {f"region:{n}": st.floats(0, 1) for n in REGIONS[:2]},
)
BOARDS = st.lists(st.tuples(st.sampled_from(HARDWARE), st.sampled_from(REGIONS), st.integers(0, 4)), min_size=1)


def drawn_before(offered: Integers, count: int, fairness: float) -> Integers:
    """The draw of jobs without quotas, written as an independent rule."""
    chosen = np.zeros(len(offered), bool)
    if turns := math.ceil(count * fairness - 1e-9):
        last = np.partition(offered, turns - 1)[turns - 1]
        chosen = offered < last
        chosen[np.flatnonzero(offered == last)[: turns - np.count_nonzero(chosen)]] = True
    chosen[np.flatnonzero(~chosen)[: count - turns]] = True
    return np.flatnonzero(chosen)


def kinds(quotas: Quotas, boards: list[tuple[str, str, int]]) -> Integers:
    found = [quotas.kinds(Device(1, True, {"name": hw}, None, 1, region=region)) for hw, region, _ in boards]
    return np.array(found, np.int64).reshape(-1, DIMENSIONS).T


@given(SHARES, st.integers(0, 50))
def test_shares_are_rounded_so_that_their_sum_is_exact(shares: list[float], count: int) -> None:
    found = apportioned(shares, count)
    assert sum(found) == math.floor(count * math.fsum(shares) + 1e-6) or math.isclose(
        sum(found), count * math.fsum(shares), abs_tol=1e-5
    )
    for number, share in zip(found, shares, strict=True):
        assert math.floor(count * share + 1e-9) <= number <= math.ceil(count * share)


def test_the_largest_remainders_get_the_places_that_are_left() -> None:
    assert apportioned([0.25, 0.25, 0.5], 10) == [3, 2, 5]
    assert apportioned([0.14, 0.36, 0.5], 10) == [1, 4, 5]
    assert apportioned([0.25], 10) == [2]
    assert apportioned([], 10) == []


@pytest.mark.parametrize(
    ("region", "expected"),
    [("", 3), ("north", 1), ("north/yard", 2), ("north/yard/shed", 2), ("north/hall", 1), ("south", 0), ("south/a", 0)],
)
def test_a_region_counts_with_those_above_it_unless_it_has_a_quota(region: str, expected: int) -> None:
    quotas = Quotas({"region:north": 0.5, "region:north/yard": 0.25, "region:": 0.1})
    assert quotas.kinds(Device(1, True, {"name": "pi"}, None, 1, region=region)) == (0, expected)


@given(st.data(), BOARDS, QUOTAS, st.floats(0, 1))
def test_no_quota_is_exceeded_and_no_place_stays_empty_that_another_board_could_have(
    data: st.DataObject, boards: list[tuple[str, str, int]], shares: dict[str, float], fairness: float
) -> None:
    count, quotas = data.draw(st.integers(1, len(boards))), Quotas(shares)
    free = quotas.places(kinds(quotas, boards), count)
    chosen = drawn(np.array([at for *_, at in boards], np.int64), count, fairness, free).tolist()
    assert len(set(chosen)) == len(chosen) <= count
    most: dict[str, int] = {}
    for what in ("hardware:", "region:"):
        own = [key for key in shares if key.startswith(what)]
        most |= dict(zip(own, apportioned([shares[key] for key in own], count), strict=True))
    taken = Counter(key for i in chosen for key in (f"hardware:{boards[i][0]}", f"region:{boards[i][1]}"))
    assert all(taken[key] <= places for key, places in most.items())
    if len(chosen) < count:  # then no other board has room by both of its quotas
        for i in set(range(len(boards))) - set(chosen):
            own = {f"hardware:{boards[i][0]}", f"region:{boards[i][1]}"} & most.keys()
            assert any(taken[key] == most[key] for key in own)


@given(st.data(), BOARDS, QUOTAS)
def test_quotas_are_named_where_no_board_has_a_place_and_not_where_one_has(
    data: st.DataObject, boards: list[tuple[str, str, int]], shares: dict[str, float]
) -> None:
    count, quotas = data.draw(st.integers(1, len(boards))), Quotas(shares)
    devices = [Device(1, True, {"name": hw}, None, 1, region=region) for hw, region, _ in boards]
    found = quotas.full(devices, count)
    chosen = drawn(np.zeros(len(boards), np.int64), count, 0.0, quotas.places(kinds(quotas, boards), count))
    assert bool(found) == (not len(chosen))
    assert set(found) <= shares.keys()
    for hardware, region, _ in boards if found else ():
        assert {f"hardware:{hardware}", f"region:{region}"} & set(found)


@given(st.data(), BOARDS, QUOTAS)
def test_within_a_kind_no_board_is_asked_twice_while_another_waits(
    data: st.DataObject, boards: list[tuple[str, str, int]], shares: dict[str, float]
) -> None:
    count, quotas = data.draw(st.integers(1, len(boards))), Quotas(shares)
    offered = np.array([at for *_, at in boards], np.int64)
    chosen = set(drawn(offered, count, 1.0, quotas.places(kinds(quotas, boards), count)).tolist())
    for i in chosen:
        for j in set(range(len(boards))) - chosen:
            if boards[i][:2] == boards[j][:2]:
                assert offered[i] <= offered[j]


@given(st.data(), BOARDS, st.floats(0, 1))
def test_without_quotas_the_draw_is_what_it_was(
    data: st.DataObject, boards: list[tuple[str, str, int]], fairness: float
) -> None:
    count, quotas = data.draw(st.integers(1, len(boards))), Quotas({})
    offered = np.array([at for *_, at in boards], np.int64)
    found = drawn(offered, count, fairness, quotas.places(kinds(quotas, boards), count))
    assert found.tolist() == drawn_before(offered, count, fairness).tolist()


class Fleet(Timed):
    """Devices of different hardware and regions."""

    def arrive(self) -> None:
        self.inbox += [
            on.DeviceBorn(n, 1, {"name": n.split("-")[0]}, 10, region=n.split("-")[1]) for n in sorted(self.boards)
        ]


def fleet(job: Job, *names: str) -> Fleet:
    shell = Fleet(job, {n: Board() for n in names})
    shell.arrive()
    return shell


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99))
def test_the_rounds_of_a_job_keep_to_its_quotas_and_rotate(seed: int) -> None:
    names = (
        [f"pi-north-{i}" for i in range(12)] + [f"x86--{i}" for i in range(4)] + [f"x86-south-{i}" for i in range(4)]
    )
    quotas = {"hardware:pi": 0.5, "region:south": 0.25}
    job = replace(JOB, seed=seed, rounds=12, devices=20, participation=0.4, fairness=1, quotas=quotas)
    shell = fleet(job, *names)
    shell.run()
    for number in range(1, 13):
        asked = [n for r, n, _ in shell.offered if r == number]
        assert len(asked) == 8
        assert sum(n.startswith("pi") for n in asked) <= 4
        assert sum("-south-" in n for n in asked) <= 2
    times = Counter(n for _, n, _ in shell.offered)
    of_pi = [times[n] for n in names if n.startswith("pi")]
    assert max(of_pi) - min(of_pi) <= 1


def test_over_selection_closes_with_what_the_quotas_leave() -> None:
    job = replace(JOB, devices=4, participation=0.5, over_selection=1.0, quotas={"hardware:pi": 0.5})
    shell = fleet(job, *(f"pi-north-{i}" for i in range(4)))
    shell.run()
    assert [len([n for r, n, _ in shell.offered if r == number]) for number in (1, 2, 3)] == [2, 2, 2]
    assert all(len(counted) == 2 for counted in shell.counted())


def test_a_round_waits_for_boards_that_its_quotas_allow() -> None:
    shell = fleet(replace(JOB, devices=1, quotas={"hardware:pi": 0.5}), "pi-north-0")
    while shell.inbox:
        shell.step()
    assert shell.state.phase is Phase.WAITING
    assert shell.state.round == 0
    shell.feed(on.DeviceBorn("x86-north-0", 1, {"name": "x86"}, 10))
    assert shell.state.phase is Phase.SCORING
    assert sorted(shell.state.tasks) == ["pi-north-0", "x86-north-0"]


def test_exploration_takes_no_quotas() -> None:
    job = replace(JOB, density=0.0, strategy="autoflip", quotas={"hardware:pi": 0.5})
    with pytest.raises(ConfigError, match="exploration"):
        Timed(job, {})


@pytest.mark.parametrize("schedule", [{"arrivals": 2, "concurrent": 4}, {"window_s": 15, "least": 1, "concurrent": 4}])
def test_of_the_devices_that_work_at_a_time_no_quota_is_exceeded(schedule: dict[str, Any]) -> None:
    job = replace(job_of(rounds=8, devices=12, **schedule), quotas={"hardware:pi": 0.5, "region:south": 0.25})
    shell = fleet(job, *(f"pi-north-{i}" for i in range(8)), *(f"x86-south-{i}" for i in range(4)), "x86--0")
    most = 0
    while shell.state.phase is not Phase.FINISHED:
        shell.step()
        works = [n for n, t in shell.state.tasks.items() if t.progress in WORKING]
        assert sum(n.startswith("pi") for n in works) <= 2
        assert sum("-south-" in n for n in works) <= 1
        most = max(most, len(works))
    assert most == 4
    assert len({n for _, n, _ in shell.offered}) > 6


def test_devices_without_a_place_keep_no_asynchronous_round_open() -> None:
    """Those that no quota lets in are as if they weren't there: the others' updates are enough."""
    job = replace(job_of(arrivals=3, rounds=2, devices=3, deadline_s=50), quotas={"hardware:pi": 0.2})
    shell = fleet(job, "pi-north-0", "pi-north-1", "x86--0", "x86--1")
    shell.run()
    assert {n for _, n, _ in shell.offered} == {"x86--0", "x86--1"}
    assert shell.now < 150
