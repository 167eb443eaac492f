"""The accountant that every board can do: against dp-accounting's own figures, and sound where floats end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.updates.privacy import delta, epsilon, most_cost

pytestmark = pytest.mark.board


@pytest.mark.once  # boards don't have the library
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("cost", [1e-9, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 500.0])
@pytest.mark.parametrize("at", [0.1, 1e-5, 1e-9])
def test_it_says_what_dp_accounting_says(cost: float, at: float) -> None:
    library = pytest.importorskip("dp_accounting", exc_type=ImportError)
    assert epsilon(cost, at) == pytest.approx(library.get_epsilon_gaussian(cost**-0.5, at), rel=1e-6, abs=1e-12)


@pytest.mark.once
@pytest.mark.parametrize("cost", [1e4, 1e6])
def test_where_floats_end_it_says_too_much_and_not_too_little(cost: float) -> None:
    library = pytest.importorskip("dp_accounting", exc_type=ImportError)
    exact = library.get_epsilon_gaussian(cost**-0.5, 1e-5)
    assert exact <= epsilon(cost, 1e-5) <= exact + 1


@pytest.mark.once
def test_subsampling_would_cost_less_and_is_never_claimed() -> None:
    """Opacus and others count Poisson sampling (Mironov et al. 2019); without it their bound is no less than ours."""
    library = pytest.importorskip("dp_accounting", exc_type=ImportError)
    for share in (1.0, 0.1):
        known = library.rdp.RdpAccountant()
        event = library.GaussianDpEvent(1.0)
        known.compose(event if share == 1 else library.PoissonSampledDpEvent(share, event), 100)
        assert (epsilon(100.0, 1e-5) <= known.get_epsilon(1e-5)) == (share == 1)


def test_it_is_below_the_bounds_by_moments_that_are_published() -> None:
    for multiplier, rounds in ((1.0, 1), (1.1, 60), (4.0, 1000)):
        cost = rounds / multiplier**2
        # Renyi: α/(2z²) a release (Mironov 2017, Proposition 7), turned into ε as Opacus does (Balle et al. 2020).
        orders = [1 + x / 10 for x in range(1, 1000)]
        renyi = min(
            a * cost / 2 + math.log1p(-1 / a) - (math.log(1e-5) + math.log(a)) / (a - 1) for a in orders if a > 1
        )
        assert 0.7 * renyi < epsilon(cost, 1e-5) <= renyi + 1e-9


@given(st.floats(1e-6, 1e5), st.floats(1e-12, 0.5))
def test_what_it_says_is_promised_and_grows_with_what_is_spent(cost: float, at: float) -> None:
    said = epsilon(cost, at)
    assert delta(cost, said) <= at
    assert epsilon(1.01 * cost, at) >= said


@given(st.floats(1e-3, 1e4), st.floats(1e-12, 0.1))
def test_a_budget_is_a_cost_and_back(budget: float, at: float) -> None:
    most = most_cost(budget, at)
    assert epsilon(most, at) <= budget < epsilon(most * (1 + 1e-6) + 1e-12, at)


def test_nothing_costs_nothing_and_no_noise_costs_all() -> None:
    assert epsilon(0.0, 1e-5) == 0.0
    assert epsilon(math.inf, 1e-5) == math.inf
