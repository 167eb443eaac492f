"""Medians and trimmed means under coverage."""

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.robust import robust_mean
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.methods.robust import RobustAggregator, Robustness
from fedprune.strategies.values import Scene, UpdateReport
from support.fakes.strategy_reports import close, report, scene
from support.fakes.strategy_rounds import NET
from support.nets.drawn_models import architectures, model, perturb_submodel, ranks, seeds, widths
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

CENTRES = ["median", "trimmed"]


def identical(first: Tensors, second: Tensors) -> bool:
    return list(first) == list(second) and all(first[n].tobytes() == second[n].tobytes() for n in first)


@st.composite
def rounds(draw: st.DrawFn, min_reports: int = 1) -> tuple[Scene, list[UpdateReport]]:
    architecture = draw(architectures())
    base = model(architecture, draw(seeds))
    current_scene = scene(architecture, base)
    order = draw(st.none() | ranks(architecture))
    reports = []
    for k in range(draw(st.integers(min_reports, 5))):
        selection = Selection.of(architecture, draw(widths(architecture)), order)
        mask = {}
        if draw(st.booleans()):
            dice, shapes = np.random.default_rng(k), selection.shapes()
            mask = {t.name: np.asarray(dice.random(shapes[t.name]) < 0.6) for t in architecture.trainable}
        tensors = perturb_submodel(selection, base, draw(seeds))
        weight = draw(st.integers(1, 100))
        reports.append(report(current_scene, selection, tensors, weight, mask=mask, device=f"d{k}", steps=k + 1))
    return current_scene, reports


def stacks(name: str, current_scene: Scene, reports: list[UpdateReport]) -> tuple[Any, Any]:
    """Values [device, ...] and who holds what, by plain loops."""
    spec = current_scene.architecture.by_name[name]
    values, coverage = np.zeros((len(reports), *spec.shape)), np.zeros((len(reports), *spec.shape), bool)
    for k, each in enumerate(reports):
        index = np.ix_(*each.trained.selection.maps(name)) if spec.axes else ...
        values[k, ...][index] = each.trained.tensors[name]
        coverage[k, ...][index] = each.trained.mask.get(name, True)
    return values, coverage


@settings(max_examples=40)
@given(rounds(), st.sampled_from(CENTRES), st.sampled_from([0.0, 0.2, 0.4]))
def test_a_coordinate_s_centre_is_taken_over_those_that_hold_it(
    case: tuple[Scene, list[UpdateReport]], kind: str, trim: float
) -> None:
    current_scene, reports = case
    got = close(RobustAggregator(Mean(), Robustness(centre=kind, trim=trim)), current_scene, reports).model
    for name, base in current_scene.model.items():
        values, coverage = stacks(name, current_scene, reports)
        expected = base.astype(np.float64).copy()
        for index in np.ndindex(*base.shape):
            mine = np.sort(values[(slice(None), *index)][coverage[(slice(None), *index)]])
            cut = int(trim * len(mine) + 1e-9)
            if len(mine):
                expected[index] = np.median(mine) if kind == "median" else mine[cut : len(mine) - cut].mean()
        assert np.allclose(got[name], expected, rtol=1e-5, atol=1e-6)
        nobody = ~coverage.any(axis=0)
        assert got[name][nobody].tobytes() == base[nobody].tobytes()


@settings(max_examples=30)
@given(rounds(min_reports=2), st.sampled_from(CENTRES))
def test_with_filling_devices_without_a_coordinate_vote_for_no_change(
    case: tuple[Scene, list[UpdateReport]], kind: str
) -> None:
    current_scene, reports = case
    got = close(RobustAggregator(Mean(rule="fill"), Robustness(centre=kind, trim=0.2)), current_scene, reports).model
    for spec in current_scene.architecture.trainable:
        values, coverage = stacks(spec.name, current_scene, reports)
        ordered = np.sort(np.where(coverage, values, current_scene.model[spec.name]), axis=0)
        cut = int(0.2 * len(reports) + 1e-9)
        middle = np.median(ordered, axis=0) if kind == "median" else ordered[cut : len(ordered) - cut].mean(axis=0)
        expected = np.where(coverage.any(axis=0), middle, current_scene.model[spec.name])
        assert np.allclose(got[spec.name], expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(rounds(), st.sampled_from(CENTRES), st.integers(1, 3000), st.randoms(use_true_random=False))
def test_neither_order_nor_memory_changes_a_bit(
    case: tuple[Scene, list[UpdateReport]], kind: Any, budget: int, dice: random.Random
) -> None:
    current_scene, reports = case
    one = close(RobustAggregator(Mean(), Robustness(centre=kind)), current_scene, reports)
    shuffled = list(reports)
    dice.shuffle(shuffled)
    assert identical(
        one.model, close(RobustAggregator(Mean(), Robustness(centre=kind), budget), current_scene, shuffled).model
    )


def test_memory_does_not_grow_with_the_fleet() -> None:
    kind = TensorSpec("w", TensorKind.WEIGHT, (Axis((Segment(0, 0, 64),)), Axis.fixed(4096)))
    architecture = Architecture("big", (ChannelGroup("c", 64),), (kind,), (), (), (3,), (1,))
    base = model(architecture, 0)
    current_scene, budget = scene(architecture, base), 2 * base["w"].nbytes
    submodels = [
        perturb_submodel(selection, base, 1) for selection in (Selection.of(architecture, (n,)) for n in (64, 32))
    ]
    peaks = []
    for fleet in (8, 64):
        reports = [
            report(current_scene, Selection.of(architecture, (n,)), submodels[k % 2], device=f"d{k}")
            for k, n in enumerate([(64, 32)[k % 2] for k in range(fleet)])
        ]
        close(
            RobustAggregator(Mean(), Robustness(), budget), current_scene, reports[:2]
        )  # numpy's and our own scratch memory
        tracemalloc.start()
        try:
            close(RobustAggregator(Mean(), Robustness(), budget), current_scene, reports)
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
    current_scene, full_selection = scene(architecture, base), Selection.full(architecture)
    honest = [perturb_submodel(full_selection, base, seed + k) for k in range(4)]
    worst = {n: np.full_like(v, 7.9) for n, v in base.items()}
    reports = [report(current_scene, full_selection, p, 1, device=f"h{k}") for k, p in enumerate(honest)]
    reports += [report(current_scene, full_selection, worst, 1000, device=f"bad{k}") for k in range(3)]
    for how in (Robustness(centre="median"), Robustness(centre="trimmed", trim=0.43)):
        for name, value in close(RobustAggregator(Mean(rule=rule), how), current_scene, reports).model.items():
            lowest, highest = (f([p[name] for p in honest], axis=0) for f in (np.min, np.max))
            assert ((value >= lowest - 1e-6) & (value <= highest + 1e-6)).all()


NET_OF_ONE_LAYER = written_net(
    {"c": 8}, {"w": ("c", 6), "b": ("c",)}, (3,), (0,), kinds={"b": TensorKind.BIAS}, layers=()
)


def test_moves_of_earlier_models_are_what_is_compared() -> None:
    architecture = NET_OF_ONE_LAYER
    now, earlier = model(architecture, 0), model(architecture, 1)
    current_scene, earlier_scene, full_selection = (
        scene(architecture, now),
        scene(architecture, earlier),
        Selection.full(architecture),
    )
    move = {n: np.full_like(v, 0.02) for n, v in now.items()}
    trained_tensors = {n: earlier[n] + move[n] for n in earlier}
    reports = [
        report(earlier_scene, full_selection, trained_tensors, 1, device=f"d{k}", sent=earlier) for k in range(3)
    ]
    got = close(RobustAggregator(DeltaMean(), Robustness()), current_scene, reports).model
    assert all(np.allclose(got[n], now[n] + 0.02, atol=1e-6) for n in now)


@pytest.mark.parametrize("kind", CENTRES)
def test_tiny_statistics_that_nobody_holds_keep_their_bits(kind: str) -> None:
    """Sums hold 2^-52 and more: a variance of 10^-12 would come back rounded."""
    base = {n: v * np.float32(1e-12) for n, v in model(NET, 0).items()}
    current_scene, narrow = scene(NET, base), Selection.of(NET, (2, 2))
    reports = [report(current_scene, narrow, perturb_submodel(narrow, base, k), device=f"d{k}") for k in range(3)]
    got = close(RobustAggregator(Mean(), Robustness(centre=kind)), current_scene, reports).model
    for name in ("norm.mean", "norm.variance"):
        out = ~narrow.coverage_mask(name)
        assert got[name][out].tobytes() == base[name][out].tobytes()


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
    assert np.allclose(robust_mean(values, kind, trim), expected, rtol=1e-6, atol=1e-7)
