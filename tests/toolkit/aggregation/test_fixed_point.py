"""Order-free sums: exact, in any order and grouping, within their range."""

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import MAX_WEIGHT, VALUE_BITS, FixedSum, Range, check_range
from fedprune.core.errors import ProtocolError

pytestmark = pytest.mark.board

floats = st.floats(-8, 8, width=32)
terms = st.lists(st.tuples(floats, st.integers(1, 100_000)), min_size=1, max_size=12)


def fixed_sum(pairs: list[tuple[float, int]], span: Range) -> FixedSum:
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
    assert bits(fixed_sum(pairs, Range(3, limbs))) == bits(fixed_sum(shuffled, Range(3, limbs)))


@given(terms, st.integers(1, 3))
def test_a_mean_is_off_by_half_a_unit_at_most(pairs: list[tuple[float, int]], limbs: int) -> None:
    span = Range(3, limbs)
    got = sum(
        Fraction(int(limb[0])) * Fraction(2) ** (span.exponent - VALUE_BITS * i)
        for i, limb in enumerate(fixed_sum(pairs, span).limbs, start=1)
    )
    assert abs(got - sum(Fraction(v) * n for v, n in pairs)) <= Fraction(span.unit) * sum(n for _, n in pairs) / 2


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
    all_.add_rows(rows, weights)
    assert bits(one) == bits(all_)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("limbs", [1, 2])
def test_the_largest_weight_at_the_bound_does_not_overflow(sign: int, limbs: int) -> None:
    total = FixedSum((1,), Range(3, limbs))
    total.add(np.array([8.0 * sign], np.float32), MAX_WEIGHT)
    assert total.value()[0] == 8.0 * sign * MAX_WEIGHT


@pytest.mark.parametrize("quiet", [0.01, 7.9])
@pytest.mark.parametrize("at", [0, 8_192, 131_072, 399_999])
def test_a_value_out_of_range_is_found_however_large_the_others_are(quiet: float, at: int) -> None:
    values = np.full(400_000, quiet, np.float32)
    check_range("w", values, 8.0)
    for wrong in (8.001, -8.001, float("nan"), float("inf"), float("-inf")):
        values[at] = wrong
        with pytest.raises(ProtocolError, match="values of w"):
            check_range("w", values, 8.0)
