"""Folding with masks of elements, from earlier models, at a rate, with damped momentum, without personal tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold, Rule
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection, Tensors
from support.nets.drawn_models import architectures, model, ranks, seeds, selections, trained, widths

pytestmark = pytest.mark.board

ATOL = 1e-6

NORM = Architecture(
    "norm",
    (ChannelGroup("c", 4),),
    tuple(
        TensorSpec(k.value, k, (Axis((Segment(0, 0, 4),)),))
        for k in (TensorKind.WEIGHT, TensorKind.STAT_MEAN, TensorKind.STAT_VAR)
    ),
    (),
    (),
    (3,),
    2,
)

Masked = tuple[Selection, Tensors, int, int, ElementMask | None]


def random_mask(selection: Selection, seed: int) -> ElementMask:
    """A mask of about half of some trained tensors, and of nothing of the others."""
    dice = np.random.default_rng(seed)
    shapes = selection.shapes()
    chosen = [t.name for t in selection.architecture.trainable if dice.random() < 0.7]
    return ElementMask({n: np.asarray(dice.random(shapes[n]) < 0.5) for n in chosen})


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Architecture, Tensors, list[Masked]]:
    """A round of up to four updates, with masks or without."""
    architecture = draw(architectures())
    base = model(architecture, draw(seeds))
    common = draw(st.none() | ranks(architecture))
    updates: list[Masked] = []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(ranks(architecture)) if draw(st.booleans()) else common
        selection = Selection.of(architecture, draw(widths(architecture)), order)
        mask = random_mask(selection, draw(seeds)) if draw(st.booleans()) else None
        weight, steps = draw(st.integers(1, 1000)), draw(st.integers(1, 50))
        updates.append((selection, trained(selection, base, draw(seeds)), weight, steps, mask))
    return architecture, base, updates


def folded(architecture: Architecture, base: Tensors, updates: list[Masked], **options: Any) -> Fold:
    fold = Fold(architecture, base, **options)
    for selection, part, weight, steps, mask in updates:
        fold.add(selection, part, weight, steps, mask=mask)
    return fold


def identical(one: Tensors, other: Tensors) -> bool:
    return list(one) == list(other) and all(one[n].tobytes() == other[n].tobytes() for n in one)


def plain_sums(name: str, architecture: Architecture, updates: list[Masked]) -> tuple[Any, Any]:
    """Σ n·m·w and Σ n·m, in float64 and by plain loops."""
    spec = architecture.by_name[name]
    total, mass = np.zeros(spec.shape), np.zeros(spec.shape)
    for selection, part, weight, _, mask in updates:
        at = np.ix_(*selection.maps(name)) if spec.axes else ...
        active = np.ones(part[name].shape) if mask is None or name not in mask.active else mask.active[name]
        total[at] += weight * active * part[name].astype(np.float64)
        mass[at] += weight * active
    return total, mass


@given(rounds())
def test_masked_means_are_taken_over_those_whose_mask_holds_a_coordinate(
    case: tuple[Architecture, Tensors, list[Masked]],
) -> None:
    architecture, base, updates = case
    n = sum(u[2] for u in updates)
    cover, fill, zero = (
        folded(architecture, base, updates, rule=r).close()[0]  # type: ignore[arg-type]
        for r in ("coverage", "fill", "zero")
    )
    fold = folded(*case)
    for spec in architecture.trainable:
        total, mass = plain_sums(spec.name, architecture, updates)
        assert np.array_equal(fold.mass(spec.name), mass)
        expected = np.where(mass > 0, total / np.maximum(mass, 1), base[spec.name])
        assert np.allclose(cover[spec.name], expected, rtol=1e-6, atol=ATOL)
        assert np.allclose(fill[spec.name], (total + (n - mass) * base[spec.name]) / n, rtol=1e-6, atol=ATOL)
        assert np.allclose(zero[spec.name], total / n, rtol=1e-6, atol=ATOL)
        for got in (cover, fill):
            assert got[spec.name][mass == 0].tobytes() == base[spec.name][mass == 0].tobytes()


@given(rounds())
def test_masks_of_ones_change_no_bit(case: tuple[Architecture, Tensors, list[Masked]]) -> None:
    architecture, base, updates = case
    ones = [
        (s, p, n, k, ElementMask({t.name: np.ones(p[t.name].shape, np.bool_) for t in architecture.trainable}))
        for s, p, n, k, _ in updates
    ]
    bare = [(*u[:4], None) for u in updates]
    assert identical(folded(architecture, base, ones).close()[0], folded(architecture, base, bare).close()[0])


@given(st.data(), seeds)
def test_a_mask_of_whole_channels_is_a_narrower_submodel(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    narrow = data.draw(selections(architecture))
    other = data.draw(selections(architecture))
    full = trained(Selection.full(architecture), base, seed + 1)
    mask = ElementMask({t.name: narrow.covered(t.name) for t in architecture.trainable})
    for rule in ("coverage", "fill"):
        one, two = (Fold(architecture, base, rule=rule, evidence=True) for _ in range(2))
        one.add(Selection.full(architecture), full, 3, 2, mask=mask)
        two.add(narrow, narrow.gather(full), 3, 2)
        for fold in (one, two):
            fold.add(other, trained(other, base, seed + 2), 5, 4)
        got, expected = one.close()[0], two.close()[0]
        for spec in architecture.trainable:
            assert got[spec.name].tobytes() == expected[spec.name].tobytes()
            for a, b in zip(one.movement(spec.name), two.movement(spec.name), strict=True):
                assert a.tobytes() == b.tobytes()


@settings(max_examples=30)
@given(rounds(), st.sampled_from(["coverage", "fill", "zero"]), st.randoms(use_true_random=False))
def test_order_does_not_change_a_bit(
    case: tuple[Architecture, Tensors, list[Masked]], rule: Rule, dice: random.Random
) -> None:
    architecture, base, updates = case
    shuffled = list(updates)
    dice.shuffle(shuffled)
    options: dict[str, Any] = {"rule": rule, "evidence": True}
    whole = folded(architecture, base, updates, **options)
    parts = folded(architecture, base, shuffled, **options)
    steps: dict[str, Any] = {"rate": 0.3, "damped": True}
    assert identical(parts.close(0.5, **steps)[0], whole.close(0.5, **steps)[0])
    for spec in architecture.trainable:
        assert all(
            a.tobytes() == b.tobytes()
            for a, b in zip(parts.movement(spec.name), whole.movement(spec.name), strict=True)
        )


@given(rounds())
def test_what_was_sent_makes_no_difference_where_it_is_the_base(
    case: tuple[Architecture, Tensors, list[Masked]],
) -> None:
    architecture, base, updates = case
    fold = Fold(architecture, base, evidence=True)
    for selection, part, weight, steps, mask in updates:
        fold.add(selection, part, weight, steps, mask=mask, sent=selection.gather(base))
    expected = folded(architecture, base, updates, evidence=True)
    assert identical(fold.close()[0], expected.close()[0])


@given(rounds(), seeds)
def test_updates_of_earlier_models_move_the_model_of_now(
    case: tuple[Architecture, Tensors, list[Masked]], seed: int
) -> None:
    architecture, base, updates = case
    earlier = model(architecture, seed)
    fold, moves = Fold(architecture, base), []
    for k, (selection, _, weight, steps, mask) in enumerate(updates):
        sent = selection.gather(earlier)
        part = trained(selection, earlier, seed + k)
        fold.add(selection, part, weight, steps, mask=mask, sent=sent)
        moves.append((selection, {n: part[n] - sent[n] for n in part}, weight, steps, mask))
    got, _ = fold.close()
    for spec in architecture.trainable:
        total, mass = plain_sums(spec.name, architecture, moves)
        expected = base[spec.name] + total / np.maximum(mass, 1)
        assert np.allclose(got[spec.name], expected, rtol=1e-6, atol=ATOL)
        assert got[spec.name][mass == 0].tobytes() == base[spec.name][mass == 0].tobytes()
    for spec in architecture.statistics:
        assert (got[spec.name] >= 0).all() or not spec.name.endswith("var")


@given(rounds(), st.floats(0.01, 3))
def test_a_rate_goes_that_share_of_the_way(case: tuple[Architecture, Tensors, list[Masked]], rate: float) -> None:
    architecture, base, _ = case
    mean = folded(*case).close()[0]
    got = folded(*case).close(rate=rate)[0]
    assert identical(folded(*case).close(rate=1.0)[0], mean)
    for spec in architecture.tensors:
        share = rate if spec.kind.trainable else min(rate, 1.0)
        before = base[spec.name].astype(np.float64)
        assert np.allclose(got[spec.name], before + share * (mean[spec.name] - before), rtol=1e-5, atol=1e-5)


@given(rounds(), st.floats(0.1, 0.95), st.floats(0.1, 2))
def test_damped_momentum_is_a_moving_average(
    case: tuple[Architecture, Tensors, list[Masked]], beta: float, rate: float
) -> None:
    architecture, base, updates = case
    mean = folded(*case).close()[0]
    before = {t.name: model(architecture, 5)[t.name] for t in architecture.trainable}
    got, velocity = folded(*case).close(beta, before, rate=rate, damped=True)
    assert velocity is not None
    for spec in architecture.trainable:
        held = plain_sums(spec.name, architecture, updates)[1] > 0
        way = mean[spec.name].astype(np.float64) - base[spec.name]
        speed = np.where(held, beta * before[spec.name] + (1 - beta) * rate * way, before[spec.name])
        assert np.allclose(velocity[spec.name], speed, rtol=1e-5, atol=1e-5)
        expected = base[spec.name] + np.where(held, speed, 0)
        assert np.allclose(got[spec.name], expected, rtol=1e-5, atol=1e-5)


@given(rounds(), st.sampled_from([0.0, 0.5]))
def test_excluded_tensors_keep_their_bits_and_need_not_come(
    case: tuple[Architecture, Tensors, list[Masked]], momentum: float
) -> None:
    architecture, base, updates = case
    out = [t.name for t in architecture.tensors][-2:]
    without = [(s, {n: v for n, v in p.items() if n not in out}, n, k, m) for s, p, n, k, m in updates]
    fold = folded(architecture, base, without, excluded=out, evidence=True)
    got, velocity = fold.close(momentum)
    expected = folded(architecture, base, updates).close(momentum)[0]
    assert all(got[n].tobytes() == base[n].tobytes() for n in out)
    assert not set(out) & set(velocity or {})
    for spec in architecture.trainable:
        if spec.name not in out:
            assert got[spec.name].tobytes() == expected[spec.name].tobytes()
        else:
            assert not fold.mass(spec.name).any()
            assert not fold.movement(spec.name)[2].any()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), 1e9])
def test_rates_that_make_no_sense_are_refused(rate: float) -> None:
    with pytest.raises(BundleError, match="server rate"):
        Fold(NORM, model(NORM, 0)).close(rate=rate)


@pytest.mark.parametrize(
    "active",
    [
        {"nowhere": np.ones(3, np.bool_)},
        {"stat_mean": np.ones(3, np.bool_)},
        {"weight": np.ones(4, np.bool_)},
        {"weight": np.ones(3)},
    ],
)
def test_masks_that_do_not_fit_are_refused_and_leave_nothing_behind(active: dict[str, Any]) -> None:
    base = model(NORM, 0)
    selection = Selection.of(NORM, (3,))
    fold = Fold(NORM, base)
    with pytest.raises(ProtocolError, match="mask of"):
        fold.add(selection, trained(selection, base, 1), 1, mask=ElementMask(active))
    assert fold.weight == 0
    assert identical(fold.close()[0], base)


def test_an_update_that_would_leave_the_bounds_when_rebased_is_refused() -> None:
    base = model(NORM, 0)
    selection = Selection.full(NORM)
    fold = Fold(NORM, base)
    far = {**base, "weight": np.full(4, fold.bound("weight"), np.float32)}
    low = {**base, "weight": -far["weight"]}
    with pytest.raises(ProtocolError, match="moved as an earlier model was"):
        fold.add(selection, far, 1, sent=low)
    assert fold.weight == 0


def test_clearing_forgets_all_updates() -> None:
    base = model(NORM, 0)
    selection = Selection.full(NORM)
    fold = Fold(NORM, base, evidence=True)
    fold.add(selection, trained(selection, base, 1), 3)
    fold.clear()
    assert (fold.weight, fold.updates) == (0, 0)
    assert identical(fold.close()[0], base)


def test_tensors_to_exclude_must_be_there() -> None:
    with pytest.raises(BundleError, match="no tensor 'head'"):
        Fold(NORM, model(NORM, 0), excluded=["head"])
