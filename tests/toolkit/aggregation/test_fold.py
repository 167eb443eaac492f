"""Folding updates: FedAvg, coverage, filling, masks, earlier models, momentum, and bits that don't depend on order."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS
from fedprune.aggregation.fold import Fold, Rule
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import Architecture, TensorKind, TensorSpec
from fedprune.model.selection import ElementMask, Selection, Tensors
from support.nets.drawn_models import (
    Update,
    architectures,
    model,
    perturb_submodel,
    ranks,
    rounds,
    seeds,
    selections,
    widths,
)
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

ATOL = 1e-6

KINDS = {k.value: k for k in (TensorKind.WEIGHT, TensorKind.STAT_MEAN, TensorKind.STAT_VAR)}
NORM = written_net({"c": 4}, dict.fromkeys(KINDS, ("c",)), (3,), (2,), kinds=KINDS, layers=())

Masked = tuple[Selection, Tensors, int, int, ElementMask]


def fold_of(architecture: Architecture, base: Tensors, updates: Sequence[Update | Masked], **options: Any) -> Fold:
    fold = Fold(architecture, base, **options)
    for selection, tensors, weight, steps, *mask in updates:
        fold.add(selection, tensors, weight, steps, mask=mask[0] if mask else {})
    return fold


def identical(first: Tensors, second: Tensors) -> bool:
    return list(first) == list(second) and all(
        first[n].tobytes() == second[n].tobytes() and first[n].shape == second[n].shape for n in first
    )


def sums(spec: TensorSpec, updates: list[Update]) -> tuple[Any, Any, int]:
    """Σ n·w, Σ n where held, and Σ n, in float64 and by plain loops."""
    total, mass = np.zeros(spec.shape), np.zeros(spec.shape)
    for selection, tensors, weight, _ in updates:
        at = np.ix_(*selection.maps(spec.name)) if spec.axes else ...
        total[at] += weight * tensors[spec.name].astype(np.float64)
        mass[at] += weight
    return total, mass, sum(u[2] for u in updates)


@given(rounds())
def test_coverage_is_the_mean_over_those_that_hold_a_coordinate(
    case: tuple[Architecture, Tensors, list[Update]],
) -> None:
    architecture, base, updates = case
    got, _ = fold_of(architecture, base, updates, rule="coverage").close()
    for spec in architecture.tensors:
        total, mass, _ = sums(spec, updates)
        expected = np.where(mass > 0, total / np.maximum(mass, 1), base[spec.name])
        assert np.allclose(got[spec.name], expected, rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("rule", ["coverage", "fill"])
@given(case=rounds(), momentum=st.sampled_from([0.0, 0.5]))
def test_a_coordinate_that_nobody_holds_keeps_its_bits(
    rule: Rule, case: tuple[Architecture, Tensors, list[Update]], momentum: float
) -> None:
    architecture, base, updates = case
    got, _ = fold_of(architecture, base, updates, rule=rule).close(momentum)
    for spec in architecture.tensors:
        masked = sums(spec, updates)[1] == 0
        assert got[spec.name][masked].tobytes() == base[spec.name][masked].tobytes()


@given(rounds(), st.floats(0, 0.9))
def test_server_momentum_follows_fedavgm(case: tuple[Architecture, Tensors, list[Update]], momentum: float) -> None:
    architecture, base, updates = case
    plain, none = fold_of(architecture, base, updates).close()
    assert none is None
    before = {t.name: model(architecture, 5)[t.name] for t in architecture.trainable}
    got, velocity = fold_of(architecture, base, updates).close(momentum, before)
    assert (velocity is None) == (momentum == 0)
    if velocity is None:
        return
    for spec in architecture.tensors:
        if not spec.kind.is_trainable:
            assert spec.name not in velocity
            assert got[spec.name].tobytes() == plain[spec.name].tobytes()
            continue
        covered = sums(spec, updates)[1] > 0
        speed = momentum * before[spec.name].astype(np.float64) + (plain[spec.name] - base[spec.name])
        assert np.allclose(velocity[spec.name], np.where(covered, speed, before[spec.name]), rtol=1e-5, atol=ATOL)
        assert np.allclose(
            got[spec.name], np.where(covered, base[spec.name] + speed, base[spec.name]), rtol=1e-5, atol=ATOL
        )


@given(rounds(), st.sampled_from([0.0, 0.5, 0.9]))
def test_movement_is_what_those_that_trained_a_coordinate_did_per_step(
    case: tuple[Architecture, Tensors, list[Update]], momentum: float
) -> None:
    architecture, base, updates = case
    fold = fold_of(architecture, base, updates, evidence=True, momentum=momentum)
    for spec in architecture.trainable:
        first, second, mass = np.zeros(spec.shape), np.zeros(spec.shape), sums(spec, updates)[1]
        for selection, tensors, weight, steps in updates:
            at = np.ix_(*selection.maps(spec.name)) if spec.axes else ...
            free = sum(1 - momentum**j for j in range(1, steps + 1))
            step = (tensors[spec.name].astype(np.float64) - base[spec.name][at]) / free
            first[at] += weight * np.clip(step, -0.25, 0.25)
            second[at] += weight * np.clip(step * math.sqrt(steps), -0.25, 0.25) ** 2
        mean, square, covered = fold.movement(spec.name)
        assert np.array_equal(covered, mass > 0)
        assert np.allclose(mean, first / np.maximum(mass, 1), rtol=1e-9, atol=1e-11)
        assert np.allclose(square, second / np.maximum(mass, 1), rtol=1e-9, atol=1e-12)


@given(rounds())
def test_the_base_and_the_updates_are_left_alone(case: tuple[Architecture, Tensors, list[Update]]) -> None:
    architecture, base, updates = case
    before = {n: v.copy() for n, v in base.items()}
    copies = [{n: v.copy() for n, v in u[1].items()} for u in updates]
    got, _ = fold_of(architecture, base, updates, evidence=True).close(0.5)
    for value in got.values():
        value[...] = 7
    assert identical(base, before)
    assert all(identical(u[1], p) for u, p in zip(updates, copies, strict=True))


def test_small_variances_keep_their_digits() -> None:
    base = model(NORM, 0)
    tensors = {**base, "stat_var": np.full(4, 1.2345e-7, np.float32)}
    fold = Fold(NORM, base)
    fold.add(Selection.full(NORM), tensors, 3)
    assert fold.close()[0]["stat_var"].tobytes() == tensors["stat_var"].tobytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: {n: v for n, v in p.items() if n != "weight"}, "update lacks tensor weight"),
        (lambda p: {**p, "extra": p["weight"]}, "doesn't have: 'extra'"),
        (lambda p: {**p, "weight": p["weight"].astype(np.float64)}, "type of weight"),
        (lambda p: {**p, "weight": p["weight"][:2]}, "shape of weight"),
        (lambda p: {**p, "weight": p["weight"] * np.float32("nan")}, "values of weight.*not finite"),
        (lambda p: {**p, "weight": p["weight"] + np.float32(1e6)}, "values of weight.*magnitude up to"),
        (lambda p: {**p, "stat_var": -p["stat_var"]}, "values of stat_var.*variances from 0 up"),
    ],
)
def test_a_bad_update_is_refused_and_leaves_nothing_behind(spoil: Callable[[Tensors], Tensors], message: str) -> None:
    base = model(NORM, 0)
    selection = Selection.of(NORM, (3,))
    good = perturb_submodel(selection, base, 1)
    fold, clean = Fold(NORM, base), Fold(NORM, base)
    with pytest.raises(ProtocolError, match=message):
        fold.add(selection, spoil(good), 5)
    fold.add(selection, good, 5)
    clean.add(selection, good, 5)
    assert identical(fold.close()[0], clean.close()[0])


def test_the_total_weight_is_bounded() -> None:
    fold = Fold(NORM, model(NORM, 0))
    fold.add(Selection.full(NORM), model(NORM, 1), MAX_WEIGHT)
    with pytest.raises(ProtocolError, match="weight of an update"):
        fold.add(Selection.full(NORM), model(NORM, 1), 1)
    heavy = Fold(NORM, model(NORM, 0))
    heavy.add(Selection.full(NORM), model(NORM, 1), 1)
    with pytest.raises(ProtocolError, match="total weight"):
        fold.add_partial_sums([heavy.partial_sums()])


def test_an_update_of_another_architecture_is_refused() -> None:
    foreign = Architecture("other", NORM.groups, NORM.tensors, (), (), (3,), (2,))
    with pytest.raises(BundleError, match="another architecture"):
        Fold(NORM, model(NORM, 0)).add(Selection.full(foreign), model(foreign, 1), 1)


@pytest.mark.parametrize(
    "base",
    [
        {},
        {**model(NORM, 0), "weight": np.zeros(3, np.float32)},
        {**model(NORM, 0), "weight": np.full(4, np.nan, np.float32)},
    ],
)
def test_a_base_that_does_not_fit_is_refused(base: Any) -> None:
    with pytest.raises(BundleError, match="fold's base"):
        Fold(NORM, base)


@settings(max_examples=30)
@given(rounds(most=20), st.sampled_from(["coverage", "fill"]))
def test_updates_that_wait_give_the_bits_of_updates_one_by_one(
    case: tuple[Architecture, Tensors, list[Update]], rule: Rule
) -> None:
    architecture, base, updates = case
    fold = Fold(architecture, base, rule=rule)
    for update in updates:
        fold.add(*update)
        fold.close()  # whatever waits is added
    assert identical(fold.close()[0], fold_of(architecture, base, updates, rule=rule).close()[0])


@settings(max_examples=30)
@given(st.data(), st.integers(1, 12), seeds, st.randoms(use_true_random=False))
def test_a_mean_is_within_a_bit_of_that_in_float64(
    data: st.DataObject, devices: int, seed: int, dice: random.Random
) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    updates: list[Update] = []
    for k in range(devices):
        selection = Selection.full(architecture)
        if dice.random() < 0.5:
            selection = Selection.of(architecture, architecture.sizes, data.draw(ranks(architecture)))
        updates.append(
            (selection, perturb_submodel(selection, base, seed + k + 1), dice.choice((1, 77, 500, 20_000)), 1)
        )
    got, _ = fold_of(architecture, base, updates).close()
    dice.shuffle(updates)
    assert identical(got, fold_of(architecture, base, updates).close()[0])
    for spec in architecture.trainable:
        total, _, weight = sums(spec, updates)
        mean = total / weight
        unit = np.ldexp(8.0 * max(1.0, float(np.abs(base[spec.name]).max(initial=0))) * 2, -VALUE_BITS)
        # Half a bit of float32 from the last rounding, and half a unit of the sums.
        last = np.spacing(np.abs(mean.astype(np.float32))).astype(np.float64)
        assert (np.abs(got[spec.name] - mean) <= last * 0.5001 + unit / 2).all()


@given(st.data(), seeds)
def test_filling_is_folding_what_was_reconstructed(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    fill, averaging = Fold(architecture, base, rule="fill"), Fold(architecture, base)
    for k in range(data.draw(st.integers(1, 4))):
        selection = data.draw(selections(architecture))
        trained_tensors, weight = perturb_submodel(selection, base, seed + k + 1), data.draw(st.integers(1, 20_000))
        fill.add(selection, trained_tensors, weight)
        averaging.add(Selection.full(architecture), selection.scatter(trained_tensors, base), weight)
    got, expected = fill.close()[0], averaging.close()[0]
    for spec in architecture.trainable:
        covered = fill.mass(spec.name) > 0
        assert got[spec.name][covered].tobytes() == expected[spec.name][covered].tobytes()


def random_mask(selection: Selection, seed: int) -> ElementMask:
    """A mask of about half of some trained tensors, and of nothing of the others."""
    dice = np.random.default_rng(seed)
    chosen = [t.name for t in selection.architecture.trainable if dice.random() < 0.7]
    return {n: np.asarray(dice.random(selection.shapes()[n]) < 0.5) for n in chosen}


@st.composite
def masked_rounds(draw: st.DrawFn) -> tuple[Architecture, Tensors, list[Masked]]:
    """A round of up to four updates, with masks or without."""
    architecture = draw(architectures())
    base = model(architecture, draw(seeds))
    common = draw(st.none() | ranks(architecture))
    updates: list[Masked] = []
    for _ in range(draw(st.integers(1, 4))):
        order = draw(ranks(architecture)) if draw(st.booleans()) else common
        selection = Selection.of(architecture, draw(widths(architecture)), order)
        mask = random_mask(selection, draw(seeds)) if draw(st.booleans()) else {}
        weight, steps = draw(st.integers(1, 1000)), draw(st.integers(1, 50))
        updates.append((selection, perturb_submodel(selection, base, draw(seeds)), weight, steps, mask))
    return architecture, base, updates


def plain_sums(name: str, architecture: Architecture, updates: list[Masked]) -> tuple[Any, Any]:
    """Σ n·m·w and Σ n·m, in float64 and by plain loops."""
    spec = architecture.by_name[name]
    total, mass = np.zeros(spec.shape), np.zeros(spec.shape)
    for selection, tensors, weight, _, mask in updates:
        at = np.ix_(*selection.maps(name)) if spec.axes else ...
        active = np.ones(tensors[name].shape) if name not in mask else mask[name]
        total[at] += weight * active * tensors[name].astype(np.float64)
        mass[at] += weight * active
    return total, mass


@given(masked_rounds())
def test_masked_means_are_taken_over_those_whose_mask_holds_a_coordinate(
    case: tuple[Architecture, Tensors, list[Masked]],
) -> None:
    architecture, base, updates = case
    n = sum(u[2] for u in updates)
    cover, fill, zero = (
        fold_of(architecture, base, updates, rule=r).close()[0]  # type: ignore[arg-type]
        for r in ("coverage", "fill", "zero")
    )
    fold = fold_of(*case)
    for spec in architecture.trainable:
        total, mass = plain_sums(spec.name, architecture, updates)
        assert np.array_equal(fold.mass(spec.name), mass)
        expected = np.where(mass > 0, total / np.maximum(mass, 1), base[spec.name])
        assert np.allclose(cover[spec.name], expected, rtol=1e-6, atol=ATOL)
        assert np.allclose(fill[spec.name], (total + (n - mass) * base[spec.name]) / n, rtol=1e-6, atol=ATOL)
        assert np.allclose(zero[spec.name], total / n, rtol=1e-6, atol=ATOL)
        for got in (cover, fill):
            assert got[spec.name][mass == 0].tobytes() == base[spec.name][mass == 0].tobytes()


@given(st.data(), seeds)
def test_a_mask_of_whole_channels_is_a_narrower_submodel(data: st.DataObject, seed: int) -> None:
    architecture = data.draw(architectures())
    base = model(architecture, seed)
    narrow = data.draw(selections(architecture))
    second_selection = data.draw(selections(architecture))
    full = perturb_submodel(Selection.full(architecture), base, seed + 1)
    mask = {t.name: narrow.coverage_mask(t.name) for t in architecture.trainable}
    for rule in ("coverage", "fill"):
        one, two = (Fold(architecture, base, rule=rule, evidence=True) for _ in range(2))
        one.add(Selection.full(architecture), full, 3, 2, mask=mask)
        two.add(narrow, narrow.gather(full), 3, 2)
        for fold in (one, two):
            fold.add(second_selection, perturb_submodel(second_selection, base, seed + 2), 5, 4)
        got, expected = one.close()[0], two.close()[0]
        for spec in architecture.trainable:
            assert got[spec.name].tobytes() == expected[spec.name].tobytes()
            for a, b in zip(one.movement(spec.name), two.movement(spec.name), strict=True):
                assert a.tobytes() == b.tobytes()


@settings(max_examples=30)
@given(masked_rounds(), st.sampled_from(["coverage", "fill", "zero"]), st.randoms(use_true_random=False))
def test_order_does_not_change_a_bit(
    case: tuple[Architecture, Tensors, list[Masked]], rule: Rule, dice: random.Random
) -> None:
    architecture, base, updates = case
    shuffled = list(updates)
    dice.shuffle(shuffled)
    options: dict[str, Any] = {"rule": rule, "evidence": True}
    in_order = fold_of(architecture, base, updates, **options)
    reordered = fold_of(architecture, base, shuffled, **options)
    steps: dict[str, Any] = {"rate": 0.3, "damped": True}
    assert identical(reordered.close(0.5, **steps)[0], in_order.close(0.5, **steps)[0])
    for spec in architecture.trainable:
        assert all(
            a.tobytes() == b.tobytes()
            for a, b in zip(reordered.movement(spec.name), in_order.movement(spec.name), strict=True)
        )


@given(masked_rounds(), seeds)
def test_updates_of_earlier_models_move_the_model_of_now(
    case: tuple[Architecture, Tensors, list[Masked]], seed: int
) -> None:
    architecture, base, updates = case
    earlier = model(architecture, seed)
    fold, moves = Fold(architecture, base), []
    for k, (selection, _, weight, steps, mask) in enumerate(updates):
        sent = selection.gather(earlier)
        trained_tensors = perturb_submodel(selection, earlier, seed + k)
        fold.add(selection, trained_tensors, weight, steps, mask=mask, sent=sent)
        moves.append((selection, {n: trained_tensors[n] - sent[n] for n in trained_tensors}, weight, steps, mask))
    got, _ = fold.close()
    for spec in architecture.trainable:
        total, mass = plain_sums(spec.name, architecture, moves)
        assert np.allclose(got[spec.name], base[spec.name] + total / np.maximum(mass, 1), rtol=1e-6, atol=ATOL)
        assert got[spec.name][mass == 0].tobytes() == base[spec.name][mass == 0].tobytes()
    for spec in architecture.statistics:
        assert (got[spec.name] >= 0).all() or not spec.name.endswith("var")


@given(masked_rounds(), st.floats(0.01, 3))
def test_a_rate_goes_that_share_of_the_way(case: tuple[Architecture, Tensors, list[Masked]], rate: float) -> None:
    architecture, base, _ = case
    mean = fold_of(*case).close()[0]
    got = fold_of(*case).close(rate=rate)[0]
    assert identical(fold_of(*case).close(rate=1.0)[0], mean)
    for spec in architecture.tensors:
        share = rate if spec.kind.is_trainable else min(rate, 1.0)
        before = base[spec.name].astype(np.float64)
        assert np.allclose(got[spec.name], before + share * (mean[spec.name] - before), rtol=1e-5, atol=1e-5)


@given(masked_rounds(), st.floats(0.1, 0.95), st.floats(0.1, 2))
def test_damped_momentum_is_a_moving_average(
    case: tuple[Architecture, Tensors, list[Masked]], beta: float, rate: float
) -> None:
    architecture, base, updates = case
    mean = fold_of(*case).close()[0]
    before = {t.name: model(architecture, 5)[t.name] for t in architecture.trainable}
    got, velocity = fold_of(*case).close(beta, before, rate=rate, damped=True)
    assert velocity is not None
    for spec in architecture.trainable:
        covered = plain_sums(spec.name, architecture, updates)[1] > 0
        direction = mean[spec.name].astype(np.float64) - base[spec.name]
        speed = np.where(covered, beta * before[spec.name] + (1 - beta) * rate * direction, before[spec.name])
        assert np.allclose(velocity[spec.name], speed, rtol=1e-5, atol=1e-5)
        assert np.allclose(got[spec.name], base[spec.name] + np.where(covered, speed, 0), rtol=1e-5, atol=1e-5)


@given(masked_rounds(), st.sampled_from([0.0, 0.5]))
def test_excluded_tensors_keep_their_bits_and_need_not_come(
    case: tuple[Architecture, Tensors, list[Masked]], momentum: float
) -> None:
    architecture, base, updates = case
    out = [t.name for t in architecture.tensors][-2:]
    without = [(s, {n: v for n, v in p.items() if n not in out}, n, k, m) for s, p, n, k, m in updates]
    fold = fold_of(architecture, base, without, excluded=out, evidence=True)
    got, velocity = fold.close(momentum)
    expected = fold_of(architecture, base, updates).close(momentum)[0]
    assert all(got[n].tobytes() == base[n].tobytes() for n in out)
    assert not set(out) & set(velocity or {})
    for spec in architecture.trainable:
        if spec.name not in out:
            assert got[spec.name].tobytes() == expected[spec.name].tobytes()
        else:
            assert not fold.mass(spec.name).any()
            assert not fold.movement(spec.name)[2].any()


@pytest.mark.parametrize(
    "active", [{"nowhere": np.ones(3, np.bool_)}, {"weight": np.ones(4, np.bool_)}, {"weight": np.ones(3)}]
)
def test_masks_that_do_not_fit_are_refused_and_leave_nothing_behind(active: dict[str, Any]) -> None:
    base = model(NORM, 0)
    selection = Selection.of(NORM, (3,))
    fold = Fold(NORM, base)
    with pytest.raises(ProtocolError, match="mask of"):
        fold.add(selection, perturb_submodel(selection, base, 1), 1, mask=active)
    assert fold.weight == 0
    assert identical(fold.close()[0], base)


def test_an_update_that_would_leave_the_bounds_when_rebased_is_refused() -> None:
    base = model(NORM, 0)
    selection = Selection.full(NORM)
    fold = Fold(NORM, base)
    far = {**base, "weight": np.full(4, fold.sum_range("weight").bound, np.float32)}
    low = {**base, "weight": -far["weight"]}
    with pytest.raises(ProtocolError, match="weight, moved"):
        fold.add(selection, far, 1, sent=low)
    assert fold.weight == 0
