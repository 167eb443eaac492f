"""Transport: plans against POT, couplings against matrices, distances against float64."""

import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import MissingExtraError
from fedprune.strategies.optimal_transport import Coupling, exact_plan, solver
from fedprune.strategies.optimal_transport.alignment import squared_distances
from support.nets.drawn_models import seeds
from support.oracles.pot_plans import pot

Floats = npt.NDArray[Any]

pytest.importorskip("ot")
pytest.importorskip("scipy")


def costs(kind: str, n: int, m: int, seed: int) -> Floats:
    """Costs as transport meets them: unrelated rows, a slice of the same rows, and rows that come many times."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, 12))
    b = rng.normal(size=(m, 12))
    if kind == "slice":
        k = min(n, m)
        b[:k] = a[:k] + 0.1 * rng.normal(size=(k, 12))
    elif kind == "ties":
        a, b = a.round(0)[:, :2], b.round(0)[:, :2]
    return np.sqrt(((a[:, None] - b) ** 2).sum(2)).astype(np.float32)


def check_plan(cost: Floats, plan: Coupling) -> None:
    n, m = cost.shape
    dense = plan.dense
    assert (plan.shares > 0).all()
    np.testing.assert_allclose(dense.sum(0), 1, atol=1e-12)
    np.testing.assert_allclose(dense.sum(1), m / n, atol=1e-12)
    best = float((pot(cost) * cost).sum())
    assert abs(float((dense * cost).sum()) - best) <= 1e-7 * max(1.0, float(np.abs(cost).sum(0).max()))


@given(st.sampled_from(["far", "slice", "ties"]), st.integers(1, 24), st.integers(1, 24), seeds)
def test_plans_cost_what_pot_s_cost_and_have_uniform_marginals(kind: str, n: int, m: int, seed: int) -> None:
    cost = costs(kind, n, m, seed)
    check_plan(cost, exact_plan(cost))


@pytest.mark.parametrize("kind", ["far", "slice", "ties"])
@pytest.mark.parametrize("shape", [(256, 192), (300, 100), (200, 200)])
def test_large_plans_are_exact_and_need_no_dense_solver(kind: str, shape: tuple[int, int]) -> None:
    assert shape[0] * shape[1] > solver.SMALL_PAIRS
    cost = costs(kind, *shape, seed=shape[0])
    check_plan(cost, exact_plan(cost))


@pytest.mark.parametrize("shape", [(240, 180), (180, 240)])
@pytest.mark.parametrize("kind", ["heavy tails", "scaled rows", "scaled columns", "outliers", "one value"])
def test_plans_are_exact_where_potentials_to_begin_with_are_poor(kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(map(ord, kind)))
    cost = np.abs(rng.standard_cauchy(shape) if kind == "heavy tails" else rng.normal(size=shape))
    if kind == "outliers":
        cost[rng.random(shape) < 0.01] = 1e6
    elif kind == "one value":
        cost[:] = 3
    elif kind != "heavy tails":
        cost *= 10 ** rng.uniform(-3, 3, (shape[0], 1) if kind == "scaled rows" else (1, shape[1]))
    cost = cost.astype(np.float32)
    plan, recomputed = exact_plan(cost), exact_plan(cost)
    check_plan(cost, plan)
    assert np.array_equal(plan.dense, recomputed.dense)


@given(st.integers(1, 12), seeds)
def test_equal_widths_give_the_permutation_that_rows_were_moved_by(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, order = rng.normal(size=(n, 5)).astype(np.float32), rng.permutation(n)
    plan = exact_plan(np.sqrt(squared_distances(rows, rows[order])))
    assert plan.rows.tolist() == order.tolist()
    assert plan.shares.tolist() == [1.0] * n


@given(st.integers(1, 30), st.integers(1, 30))
def test_the_plan_in_order_is_the_best_on_a_line(n: int, m: int) -> None:
    positions = [np.arange(k) / k + 0.5 / k for k in (n, m)]
    check_plan(np.abs(positions[0][:, None] - positions[1]), Coupling.in_order(n, m))
    if n == m:
        assert np.array_equal(Coupling.in_order(n, n).dense, np.eye(n))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), seeds, st.booleans())
def test_couplings_act_as_their_matrices(n: int, m: int, before: int, after: int, seed: int, averaged: bool) -> None:
    rng = np.random.default_rng(seed)
    plan = exact_plan(rng.random((n, m)))
    if averaged:
        second_plan = exact_plan(rng.random((n, m)))
        mean = plan.average_with(second_plan)
        np.testing.assert_allclose(mean.dense, (plan.dense + second_plan.dense) / 2, atol=1e-12)
        plan = mean
    x = rng.normal(size=(before, n, after)).astype(np.float32)
    y = rng.normal(size=(before, m, after)).astype(np.float32)
    expected = np.einsum("bna,nm->bma", x, plan.dense)
    np.testing.assert_allclose(plan.forward(x), expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum("bma,nm->bna", y, plan.dense)
    np.testing.assert_allclose(plan.backward(y), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), seeds, st.sampled_from([0.0, 1e-4, 1.0]))
def test_distances_are_right_also_between_rows_that_are_almost_equal(
    n: int, m: int, features: int, seed: int, apart: float
) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, features)).astype(np.float32)
    b = (a[rng.integers(0, n, m)] + apart * rng.normal(size=(m, features))).astype(np.float32)
    exact = ((a[:, None].astype(np.float64) - b) ** 2).sum(2)
    size = (a.astype(np.float64) ** 2).sum(1)[:, None] + (b.astype(np.float64) ** 2).sum(1)
    got = squared_distances(a, b)
    assert got[exact == 0].tolist() == [0.0] * int((exact == 0).sum())
    assert (np.abs(got - exact) <= 0.02 * exact + 1e-12 * size).all()


def test_solvers_are_loaded_on_use_and_bring_no_torch() -> None:
    code = (
        "import sys, numpy as np, fedprune.strategies.optimal_transport as t, fedprune.strategies.presets;"
        "print([m for m in ('ot', 'scipy') if m in sys.modules]);"
        "t.exact_plan(np.random.default_rng(0).random((200, 150)));"
        "print([m for m in ('torch', 'jax', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_a_missing_scipy_is_named_where_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingExtraError, match="scipy"):
        Coupling.in_order(3, 2).forward(np.ones((1, 3, 1), np.float32))
