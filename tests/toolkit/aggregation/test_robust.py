"""Clipping, medians and trimmed means under coverage, and who stands out."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.client_update import ClientUpdate, norm
from fedprune.aggregation.robust import Direction, centre, clipped, standing_out
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.methods.robust import Robust, Robustness
from fedprune.strategies.values import Report, Scene
from support.fakes.strategy_reports import close, close_fold, report, scene
from support.fakes.strategy_rounds import NET
from support.nets.drawn_models import architectures, model, ranks, seeds, trained, widths

pytestmark = pytest.mark.board

CENTRES = ["median", "trimmed"]


def identical(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)


@st.composite
def rounds(draw: st.DrawFn, least: int = 1) -> tuple[Scene, list[Report]]:
    architecture = draw(architectures())
    base = model(architecture, draw(seeds))
    at = scene(architecture, base)
    order = draw(st.none() | ranks(architecture))
    reports = []
    for k in range(draw(st.integers(least, 5))):
        selection = Selection.of(architecture, draw(widths(architecture)), order)
        mask = {}
        if draw(st.booleans()):
            dice, shapes = np.random.default_rng(k), selection.shapes()
            mask = {t.name: np.asarray(dice.random(shapes[t.name]) < 0.6) for t in architecture.trainable}
        part = trained(selection, base, draw(seeds))
        weight = draw(st.integers(1, 100))
        reports.append(report(at, selection, part, weight, mask=mask, device=f"d{k}", steps=k + 1))
    return at, reports


def stacks(name: str, at: Scene, reports: list[Report]) -> tuple[Any, Any]:
    """Values [device, ...] and who holds what, by plain loops."""
    spec = at.architecture.by_name[name]
    values, held = np.zeros((len(reports), *spec.shape)), np.zeros((len(reports), *spec.shape), bool)
    for k, each in enumerate(reports):
        index = np.ix_(*each.trained.selection.maps(name)) if spec.axes else ...
        values[k, ...][index] = each.trained.tensors[name]
        mask = each.trained.mask
        held[k, ...][index] = mask.get(name, True)
    return values, held


@settings(max_examples=40)
@given(rounds(), st.sampled_from(CENTRES), st.sampled_from([0.0, 0.2, 0.4]))
def test_a_coordinate_s_centre_is_taken_over_those_that_hold_it(
    case: tuple[Scene, list[Report]], kind: str, trim: float
) -> None:
    at, reports = case
    got = close(Robust(Mean(), Robustness(centre=kind, trim=trim)), at, reports).model
    for name, base in at.model.items():
        values, held = stacks(name, at, reports)
        expected = base.astype(np.float64).copy()
        for index in np.ndindex(*base.shape):
            mine = np.sort(values[(slice(None), *index)][held[(slice(None), *index)]])
            cut = int(trim * len(mine) + 1e-9)
            if len(mine):
                expected[index] = np.median(mine) if kind == "median" else mine[cut : len(mine) - cut].mean()
        assert np.allclose(got[name], expected, rtol=1e-5, atol=1e-6)
        nobody = ~held.any(axis=0)
        assert got[name][nobody].tobytes() == base[nobody].tobytes()


@settings(max_examples=30)
@given(rounds(least=2), st.sampled_from(CENTRES))
def test_with_filling_devices_without_a_coordinate_vote_for_no_change(
    case: tuple[Scene, list[Report]], kind: str
) -> None:
    at, reports = case
    got = close(Robust(Mean(rule="fill"), Robustness(centre=kind, trim=0.2)), at, reports).model
    for spec in at.architecture.trainable:
        values, held = stacks(spec.name, at, reports)
        ordered = np.sort(np.where(held, values, at.model[spec.name]), axis=0)
        cut = int(0.2 * len(reports) + 1e-9)
        middle = np.median(ordered, axis=0) if kind == "median" else ordered[cut : len(ordered) - cut].mean(axis=0)
        expected = np.where(held.any(axis=0), middle, at.model[spec.name])
        assert np.allclose(got[spec.name], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(
    rounds(least=3),
    st.sampled_from(["mean", *CENTRES]),
    st.sampled_from(["", "norm", "cosine", "both"]),
    st.sampled_from([0.0, 0.3, "median"]),
    st.randoms(use_true_random=False),
)
def test_order_changes_no_bit(
    case: tuple[Scene, list[Report]], kind: str, check: str, clip: float | str, dice: random.Random
) -> None:
    at, reports = case
    aggregator = Robust(Mean(), Robustness(centre=kind, check=check, clip=clip, tolerance=1.0), budget=400)
    one = close(aggregator, at, reports)
    shuffled = list(reports)
    dice.shuffle(shuffled)
    two = close(aggregator, at, shuffled)
    assert identical(one.model, two.model)
    assert one.rejected == two.rejected


@pytest.mark.parametrize("how", [Robustness(centre="median"), Robustness(clip=1e-3)])
def test_memory_does_not_grow_with_the_fleet(how: Robustness) -> None:
    channels = Axis((Segment(0, 0, 64),))
    kind = TensorSpec("w", TensorKind.WEIGHT, (channels, Axis.fixed(4096)))
    architecture = Architecture("big", (ChannelGroup("c", 64),), (kind,), (), (), (3,), (1,))
    base = model(architecture, 0)
    at, budget = scene(architecture, base), 2 * base["w"].nbytes
    parts = [trained(selection, base, 1) for selection in (Selection.of(architecture, (n,)) for n in (64, 32))]
    peaks = []
    for fleet in (8, 64):
        widths_ = [(64, 32)[k % 2] for k in range(fleet)]
        reports = [
            report(at, Selection.of(architecture, (n,)), parts[k % 2], device=f"d{k}") for k, n in enumerate(widths_)
        ]
        close(Robust(Mean(), how, budget), at, reports[:2])  # numpy's and our own scratch memory
        tracemalloc.start()
        try:
            close(Robust(Mean(), how, budget), at, reports)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + base["w"].nbytes // 4
    assert peaks[1] < 12 * base["w"].nbytes


@pytest.mark.parametrize("rule", ["coverage", "fill"])
@given(data=st.data(), seed=seeds)
def test_less_than_half_can_t_move_a_median_out_of_what_the_others_say(
    rule: Any, data: st.DataObject, seed: int
) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    at, whole = scene(architecture, base), Selection.full(architecture)
    honest = [trained(whole, base, seed + k) for k in range(4)]
    worst = {n: np.full_like(v, 7.9) for n, v in base.items()}
    reports = [report(at, whole, p, 1, device=f"h{k}") for k, p in enumerate(honest)]
    reports += [report(at, whole, worst, 1000, device=f"bad{k}") for k in range(3)]
    for how in (Robustness(centre="median"), Robustness(centre="trimmed", trim=0.43)):
        got = close(Robust(Mean(rule=rule), how), at, reports).model
        for name, value in got.items():
            lowest, highest = (f([p[name] for p in honest], axis=0) for f in (np.min, np.max))
            assert ((value >= lowest - 1e-6) & (value <= highest + 1e-6)).all()


@given(rounds(), st.floats(0.01, 2))
def test_clipped_updates_are_no_longer_than_asked_and_point_the_same_way(
    case: tuple[Scene, list[Report]], limit: float
) -> None:
    at, reports = case
    for each in reports:
        addition = ClientUpdate(each.trained.selection, each.trained.tensors, 1, 1, each.trained.mask)
        before, after = addition.moves(at.model), clipped(addition, at.model, limit).moves(at.model)
        assert norm(after) <= limit * (1 + 1e-4) or norm(before) <= limit
        if norm(before) <= limit:
            assert clipped(addition, at.model, limit) is addition
        else:
            factor = limit / norm(before)
            assert all(np.allclose(after[n], factor * before[n], atol=1e-6) for n in before)


def _fleet(spoil: dict[str, Tensors]) -> tuple[Scene, list[Report]]:
    """Seven honest updates in one direction with noise, and what others make of it."""
    architecture = _net()
    base = model(architecture, 0)
    at, whole = scene(architecture, base), Selection.full(architecture)
    way = {n: np.full_like(v, 0.01) for n, v in base.items()}
    reports = []
    for k in range(7):
        noise = model(architecture, 10 + k, 0.004)
        part = {n: base[n] + way[n] + noise[n] for n in base}
        reports.append(report(at, whole, part, 1, device=f"h{k}"))
    for name, move in spoil.items():
        reports.append(report(at, whole, {n: base[n] + move[n] for n in base}, 1, device=name))
    return at, reports


def _net() -> Architecture:
    channels = Axis((Segment(0, 0, 8),))
    return Architecture(
        "net",
        (ChannelGroup("c", 8),),
        (TensorSpec("w", TensorKind.WEIGHT, (channels, Axis.fixed(6))), TensorSpec("b", TensorKind.BIAS, (channels,))),
        (),
        (),
        (3,),
        (0,),
    )


@pytest.mark.parametrize(
    ("check", "size", "caught"),
    [
        ("norm", 1.0, True),
        ("cosine", 1.0, False),
        ("cosine", -0.01, True),
        ("norm", -0.01, False),
        ("both", -1.0, True),
    ],
)
def test_updates_that_stand_out_are_rejected_with_a_reason(check: str, size: float, caught: bool) -> None:
    base = model(_net(), 0)
    bad = {n: np.full_like(v, size) for n, v in base.items()}
    at, reports = _fleet({"bad": bad})
    closing, fold = close_fold(Robust(Mean(), Robustness(check=check)), at, reports, evidence=True)
    assert set(closing.rejected) == ({"bad"} if caught else set())
    if caught:
        assert "deviations" in closing.rejected["bad"]
        expected, clean = close_fold(Mean(), at, reports[:-1], evidence=True)
        assert identical(closing.model, expected.model)
        for name in base:  # what scorers learn from is clean, too
            for a, b in zip(fold.movement(name), clean.movement(name), strict=True):
                assert a.tobytes() == b.tobytes()


@given(rounds(least=2))
def test_a_cosine_is_with_the_directions_of_all_others(case: tuple[Scene, list[Report]]) -> None:
    at, reports = case
    direction, additions, units = Direction(at.architecture, at.model), [], []
    for each in reports:
        additions.append(ClientUpdate(each.trained.selection, each.trained.tensors, 1, 1, each.trained.mask))
        direction.add(additions[-1])
    for k in range(len(reports)):  # by plain vectors over the whole model
        moves = []
        for spec in at.architecture.trainable:
            values, held = stacks(spec.name, at, reports)
            moves.append(np.where(held, values - at.model[spec.name], 0)[k].ravel())
        units.append(np.concatenate(moves) / max(1e-300, float(np.linalg.norm(np.concatenate(moves)))))
    for k, each in enumerate(reports):
        inside = np.concatenate([each.trained.selection.covered(t.name).ravel() for t in at.architecture.trainable])
        others = (sum(units) - units[k]) * inside
        length = float(np.linalg.norm(others))
        if length > 1e-3:
            assert direction.cosine(additions[k]) == pytest.approx(float(units[k] @ others) / length, abs=1e-4)


def test_moves_of_earlier_models_are_what_is_clipped_and_compared() -> None:
    architecture = _net()
    now, earlier = model(architecture, 0), model(architecture, 1)
    at, then, whole = scene(architecture, now), scene(architecture, earlier), Selection.full(architecture)
    move = {n: np.full_like(v, 0.02) for n, v in now.items()}
    part = {n: earlier[n] + move[n] for n in earlier}
    reports = [report(then, whole, part, 1, device=f"d{k}", sent=earlier) for k in range(3)]
    for how in (Robustness(centre="median"), Robustness(check="both"), Robustness(clip=1.0)):
        got = close(Robust(DeltaMean(), how), at, reports).model
        assert all(np.allclose(got[n], now[n] + 0.02, atol=1e-6) for n in now)
    short = close(Robust(DeltaMean(), Robustness(clip=0.01)), at, reports).model
    length = norm({n: short[n].astype(np.float64) - now[n] for n in now})
    assert length == pytest.approx(0.01, rel=1e-3)


def test_clipping_to_the_median_leaves_the_shorter_half() -> None:
    architecture = _net()
    base = model(architecture, 0)
    at, whole = scene(architecture, base), Selection.full(architecture)
    sizes = {"a": 0.01, "b": 0.02, "c": 0.5}
    reports = [report(at, whole, {n: v + np.float32(s) for n, v in base.items()}, device=d) for d, s in sizes.items()]
    got = close(Robust(Mean(), Robustness(clip="median")), at, reports).model
    assert all(np.allclose(got[n], base[n] + (0.01 + 0.02 + 0.02) / 3, atol=1e-6) for n in base)


@pytest.mark.parametrize("kind", CENTRES)
def test_tiny_statistics_that_nobody_holds_keep_their_bits(kind: str) -> None:
    """Sums hold 2^-52 and more: a variance of 10^-12 would come back rounded."""
    base = {n: v * np.float32(1e-12) for n, v in model(NET, 0).items()}
    at, narrow = scene(NET, base), Selection.of(NET, (2, 2))
    reports = [report(at, narrow, trained(narrow, base, k), device=f"d{k}") for k in range(3)]
    got = close(Robust(Mean(), Robustness(centre=kind)), at, reports).model
    for name in ("norm.mean", "norm.variance"):
        out = ~narrow.covered(name)
        assert got[name][out].tobytes() == base[name][out].tobytes()


@given(st.lists(st.floats(0.5, 1.5), min_size=3, max_size=9), st.floats(50, 1e6))
def test_one_far_value_stands_out_and_two_values_never_do(values: list[float], far: float) -> None:
    named = {f"d{i}": v for i, v in enumerate(values)}
    assert standing_out({**named, "far": far}, 3.5, low=False, what="x").keys() >= {"far"}
    assert standing_out({**named, "far": -far}, 3.5, low=True, what="x").keys() >= {"far"}
    assert standing_out({"a": values[0], "far": far}, 3.5, low=False, what="x") == {}
    assert standing_out(dict.fromkeys(named, 1.0), 3.5, low=False, what="x") == {}


@given(st.integers(1, 40), st.integers(1, 200), seeds, st.sampled_from(CENTRES), st.sampled_from([0.0, 0.1, 0.45]))
def test_the_centre_of_many_is_what_sorting_gives(devices: int, size: int, seed: int, kind: Any, trim: float) -> None:
    dice = np.random.default_rng(seed)
    values = dice.normal(size=(devices, size)).astype(np.float32)
    values[dice.random(values.shape) < dice.random()] = np.inf
    expected = []
    for column in values.T:
        mine = np.sort(column[np.isfinite(column)]).astype(np.float64)
        cut = int(trim * len(mine) + 1e-9)
        if not len(mine):
            expected.append(np.inf)
        else:
            expected.append(np.median(mine) if kind == "median" else mine[cut : len(mine) - cut].mean())
    assert np.allclose(centre(values, kind, trim), expected, rtol=1e-6, atol=1e-7)
