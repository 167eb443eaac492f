"""Order-free sums: exact, in any order and grouping, within their range."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Range, check_range, magnitude
from fedprune.core.errors import ProtocolError

pytestmark = pytest.mark.board

floats = st.floats(-8, 8, width=32)
terms = st.lists(st.tuples(floats, st.integers(1, 100_000)), min_size=1, max_size=12)


def summed(pairs: list[tuple[float, int]], span: Range) -> FixedSum:
    out = FixedSum((1,), span)
    for value, weight in pairs:
        out.add(np.array([value], np.float32), weight)
    return out


def bits(total: FixedSum) -> list[bytes]:
    return [limb.tobytes() for limb in total.limbs]


@given(terms, st.integers(1, 3), st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[float, int]], limbs: int, dice: random.Random) -> None:
    shuffled = list(pairs)
    dice.shuffle(shuffled)
    assert bits(summed(pairs, Range(3, limbs))) == bits(summed(shuffled, Range(3, limbs)))


@given(terms, st.integers(1, 3), st.integers(0, 12))
def test_grouping_does_not_matter(pairs: list[tuple[float, int]], limbs: int, cut: int) -> None:
    whole = summed(pairs, Range(3, limbs))
    parts = [summed(some, Range(3, limbs)) for some in (pairs[:cut], pairs[cut:])]
    assert [(a + b).tobytes() for a, b in zip(parts[0].limbs, parts[1].limbs, strict=True)] == bits(whole)


@given(terms, st.integers(1, 3))
def test_a_mean_is_off_by_half_a_unit_at_most(pairs: list[tuple[float, int]], limbs: int) -> None:
    span = Range(3, limbs)
    total = summed(pairs, span)
    got = sum(
        Fraction(int(limb[0])) * Fraction(2) ** (span.exponent - VALUE_BITS * i)
        for i, limb in enumerate(total.limbs, start=1)
    )
    exact = sum(Fraction(v) * n for v, n in pairs)
    assert abs(got - exact) <= Fraction(span.unit) * sum(n for _, n in pairs) / 2


@given(floats, st.integers(1, 20_000), st.sampled_from([np.float32, np.float64]))
def test_a_term_is_its_weight_times_the_rounded_value(value: float, weight: int, kind: type) -> None:
    total = FixedSum((1,), Range(3))
    total.add(np.array([value], kind), weight)
    exact = Fraction(value) * Fraction(2) ** (VALUE_BITS - 3)
    assert int(total.limbs[0][0]) == weight * round(exact)  # Python rounds fractions to even, too


@given(
    st.lists(st.integers(1, 2**18), min_size=1, max_size=12),
    st.sampled_from([(7,), (3, 5), (2, 3, 4)]),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 2**32),
)
def test_many_at_once_give_the_bits_of_one_after_the_other(
    weights: list[int], shape: tuple[int, ...], kind: type, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    rows = [dice.choice([-8.0, 8.0, 1e-9, dice.normal()], shape).astype(kind) for _ in weights]
    one, all_ = FixedSum(shape, Range(3)), FixedSum(shape, Range(3))
    for values, weight in zip(rows, weights, strict=True):
        one.add(values, weight)
    all_.add_all(rows, weights)
    assert bits(one) == bits(all_)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("limbs", [1, 2])
def test_the_largest_weight_at_the_bound_does_not_overflow(sign: int, limbs: int) -> None:
    total = FixedSum((1,), Range(3, limbs))
    total.add(np.array([8.0 * sign], np.float32), MAX_WEIGHT)
    assert total.value()[0] == 8.0 * sign * MAX_WEIGHT


def test_many_devices_at_the_bound_do_not_overflow() -> None:
    total = FixedSum((1,), Range(-2))
    for _ in range(64):
        total.add(np.array([0.25], np.float32), MAX_WEIGHT // 64)
    assert total.value()[0] == 0.25 * MAX_WEIGHT


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (3, 4, 2, 2), (2, 70_000), (200_000,)])
def test_shapes_of_all_kinds_are_added_as_a_whole(shape: tuple[int, ...]) -> None:
    value = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32).reshape(shape)
    total = FixedSum(shape, Range(3))
    total.add(value, 3)
    total.add(value, 4)
    assert total.value().shape == shape
    assert np.allclose(total.value(), 7 * value.astype(np.float64), rtol=0, atol=total.span.unit * 7 / 2 * 1.01)


@pytest.mark.parametrize(
    "at", [(slice(1, 3), slice(0, 2)), np.ix_([2, 0], [1, 3]), (slice(0, 2), ...), (slice(None), slice(1, 5, 2))]
)
@pytest.mark.parametrize("limbs", [1, 2])
def test_parts_are_added_at_their_place_only(at: tuple[object, ...], limbs: int) -> None:
    total, plain = FixedSum((4, 5), Range(3, limbs)), np.zeros((4, 5))
    value = np.ones(plain[at].shape, np.float32)
    total.add(value, 2, at)
    plain[at] += 2
    assert np.array_equal(total.value(), plain)


def test_values_need_not_be_contiguous() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T / 4
    total = FixedSum((4, 3), Range(3))
    total.add(value, 1)
    assert np.array_equal(total.value(), value)


def test_a_unit_is_2_to_the_38_finer_than_the_bound() -> None:
    assert Range(3).bound / Range(3).unit == 2**38
    assert Range(3, 2).bound / Range(3, 2).unit == 2**76


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1))
def test_a_range_has_room_for_eight_times_its_reference(values: list[float]) -> None:
    reference = np.array(values, np.float32)
    assert Range.around(reference).bound >= max(8.0, 8 * float(np.abs(reference).max()))


@pytest.mark.parametrize("quiet", [0.0, 0.01, 0.04, 0.1, 7.9])
@pytest.mark.parametrize("at", [0, 8_191, 8_192, 131_071, 131_072, 399_999])
def test_a_value_out_of_range_is_found_however_large_the_others_are(quiet: float, at: int) -> None:
    values = np.full(400_000, quiet, np.float32)
    check_range("w", values, 8.0)
    for wrong in (8.001, -8.001, float("nan"), float("inf"), float("-inf")):
        values[at] = wrong
        with pytest.raises(ProtocolError, match="values of w: expected finite numbers of magnitude up to 8, got"):
            check_range("w", values, 8.0)


@pytest.mark.parametrize("values", [[8.0, -8.0], [], [7.9] * 100_000])
def test_values_in_range_are_accepted_however_many(values: list[float]) -> None:
    check_range("conv1", np.array(values, np.float32), 8.0)


def test_what_was_found_is_told() -> None:
    with pytest.raises(ProtocolError, match="got 12"):
        check_range("fc", np.array([[1, -12]], np.float32), 8.0)


@given(st.lists(st.floats(-1e6, 1e6, width=32)))
def test_magnitude_is_the_largest_absolute_value(values: list[float]) -> None:
    assert magnitude(np.array(values, np.float32)) == max((abs(v) for v in values), default=0.0)
