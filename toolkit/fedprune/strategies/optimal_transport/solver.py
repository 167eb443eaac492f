"""Exact optimal transport between uniform marginals: the plan of least cost, as the earth mover's distance has it.

The plan is POT's (`ot.emd`, network simplex; SubFLOT, arXiv 2604.06631, Eq. 4), but found on a fraction of the pairs.
An optimal plan uses fewer than n + m of the n·m pairs, so the simplex is first given the cheapest few of every channel.
Its dual potentials u, v then say for all other pairs whether they could help: where C_jk ≥ u_j + v_k everywhere, the
plan is optimal for the whole matrix, by linear programming duality; pairs that break it are added, and the simplex runs
again. It gets the costs minus potentials from a few steps of Sinkhorn's algorithm. These shift the cost of every plan
by the same amount, so that the best plan stays the best, but the simplex begins close to it. Small problems, and those
for which this doesn't end soon, go to the dense solvers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError, MissingExtraError, shape_text
from fedprune.strategies.optimal_transport.coupling import SCRATCH, Coupling, ordered_entries

Indices = npt.NDArray[np.int64]
Cost = npt.NDArray[np.floating[Any]]

# Pairs up to which the simplex is faster on all of them; the assignment solver is on up to three times as many.
SMALL_PAIRS = 88 * 88

# Cheapest pairs per channel that the simplex starts with, over both sides.
_PAIRS_PER_CHANNEL = 10

# Width of Sinkhorn's kernel, relative to the spread of the costs.
_SMOOTHING = 0.12

_SINKHORN_STEPS = 8
# Over-relaxation of its steps, 1 for plain ones: fewer steps get as near (Thibault et al., arXiv 1711.01851).
_OVER_RELAXATION = 1.5

# Schraudolph's exponential (1999): the bits of exp(x), as an integer, are `_EXP_OFFSET` + x · `_EXP_FACTOR`, within 6%
# of it. The kernel needs no more: it only says where the search begins.
_EXP_OFFSET = np.float32(127 << 23)
_EXP_FACTOR = np.float32((1 << 23) / np.log(2))

_MAX_ROUNDS = 8
_MAX_PIVOTS = 10_000_000
# How far below 0 a reduced cost may be by rounding alone, relative to the largest cost.
_COST_TOLERANCE = 1e-9

# Costs whose largest is within 2^±20 are taken as they are.
_USUAL_EXPONENT = 20


def exact_plan(cost: Cost) -> Coupling:
    """The coupling of least total cost among those with uniform marginals.

    Args:
        cost: C [n, m], of moving all of source j to target k; float32 or float64.

    Raises:
        BundleError: It is no matrix of finite numbers.
        MissingExtraError: scipy or POT is not installed.
    """
    largest = _largest_cost(cost) if cost.ndim == 2 and cost.size else np.nan
    if not np.isfinite(largest):
        raise BundleError(
            "costs of a transport plan", expected="a matrix of finite numbers", got=shape_text(*cost.shape)
        )
    n, m = cost.shape
    # One channel on a side leaves one plan.
    if n == 1 or m == 1:
        return Coupling.in_order(n, m)
    cheapest = _cheapest_plan(cost)
    if cheapest is not None:
        return cheapest
    cost = _scale_to_range(cost, largest)
    # Equally many channels are an assignment problem, for which scipy has a faster solver.
    if n == m and cost.size <= 3 * SMALL_PAIRS:
        rows, columns = _load_assignment_solver()(cost)
        return Coupling.of(n, m, rows, columns, np.ones(n))
    if cost.size > SMALL_PAIRS:
        generated = _plan_by_columns(cost)
        if generated is not None:
            return generated
    return _dense_plan(cost)


def _cheapest_plan(cost: Cost) -> Coupling | None:
    """Every source to its cheapest target, or the other way round, where that is a plan: nothing can be cheaper."""
    n, m = cost.shape
    if n % m == 0:
        best = cost.argmin(1)
        if (np.bincount(best, minlength=m) == n // m).all():
            return Coupling.of(n, m, np.arange(n), best, np.ones(n))
    elif m % n == 0:
        # `argmin` along the first axis is slow. Every column has a least entry: m in all leave none a second one.
        is_least = cost == cost.min(0)
        if (np.count_nonzero(is_least, axis=1) == m // n).all():
            rows, columns = np.nonzero(is_least)
            return Coupling.of(n, m, rows, columns, np.ones(m))
    return None


def _largest_cost(cost: Cost) -> float:
    """The largest absolute cost; NaN or infinite if any of them is."""
    return float(max(cost.max(), -cost.min()))


def _scale_to_range(cost: Cost, largest: float) -> Cost:
    """Unusually large or small costs times a power of two, which leaves the plan as it is.

    The squares of costs from 1e17 overflow float32, and POT takes differences of 1e-14 for rounding.
    """
    exponent = int(np.frexp(largest)[1])
    return cost if abs(exponent) <= _USUAL_EXPONENT else np.ldexp(cost, -exponent)


def _masses(n: int, m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Uniform marginals in whole units, with which the simplex adds without rounding."""
    common = gcd(n, m)
    return np.full(n, float(m // common)), np.full(m, float(n // common))


def _dense_plan(cost: Cost) -> Coupling:
    n, m = cost.shape
    sent_mass, received_mass = _masses(n, m)
    costs = np.ascontiguousarray(cost, np.float64)
    plan, log = _load_pot().emd(
        sent_mass, received_mass, costs, numItermax=_MAX_PIVOTS, log=True, center_dual=False, check_marginals=False
    )
    if log["warning"]:
        raise BundleError("the transport plan was not found", got=str(log["warning"])[:200])
    rows, columns = np.nonzero(plan)
    return Coupling.of(n, m, rows, columns, plan[rows, columns])


def _plan_by_columns(cost: Cost) -> Coupling | None:
    """The plan by column generation; None where it does not end soon."""
    pot = _load_pot().lp.emd_wrap  # the solver behind `ot.emd`, whose sparse matrices take as long as small problems
    n, m = cost.shape
    sent_mass, received_mass = _masses(n, m)
    cost32 = np.ascontiguousarray(cost, np.float32)
    flat = cost.reshape(-1)
    scale = _largest_cost(cost32)
    max_new_pairs = _PAIRS_PER_CHANNEL * (n + m)
    reduced, sinkhorn_u, sinkhorn_v = _sinkhorn_potentials(cost32)
    is_used = _first_pairs(reduced, max_new_pairs // 2)
    for _ in range(_MAX_ROUNDS):
        pairs = np.flatnonzero(is_used)
        rows, columns = np.divmod(pairs, m)
        # Less the potentials, which move the cost of every plan by the same.
        costs = flat[pairs] - sinkhorn_u[rows] - sinkhorn_v[columns]
        i, j, flow, _, u, v, status = pot.emd_c_sparse(
            sent_mass, received_mass, rows.astype(np.uint64), columns.astype(np.uint64), costs, _MAX_PIVOTS
        )
        if pot.check_result(status):
            return None
        u += sinkhorn_u
        v += sinkhorn_v
        np.subtract(cost32, u.astype(np.float32)[:, None], out=reduced)
        # In float32 to find what may be negative, in float64 to know.
        tolerance = 1e-5 * max(scale, float(np.abs(u).max()), float(np.abs(v).max()))
        suspects = np.flatnonzero(reduced < (v + tolerance).astype(np.float32))
        reduced_costs = flat[suspects] - u[suspects // m] - v[suspects % m]
        if not (reduced_costs < -_COST_TOLERANCE * scale).any():
            bound = float(u @ sent_mass + v @ received_mass)
            i, j = i.astype(np.int64), j.astype(np.int64)
            # By duality no plan costs less than the potentials' bound. The check guards against potentials that the
            # solver left wrong.
            total = float(flow @ flat[i * m + j])
            is_optimal = total - bound <= _COST_TOLERANCE * float(sent_mass.sum()) * scale
            return Coupling.of(n, m, i, j, flow) if is_optimal else None
        added = suspects
        if suspects.size > max_new_pairs:  # the worst come first: all of them would make the problem dense
            added = suspects[np.argpartition(reduced_costs, max_new_pairs)[:max_new_pairs]]
        is_used[added] = True
        if suspects.size < max_new_pairs:  # pairs that come near may be the next to break it
            reduced -= v.astype(np.float32)
            is_used |= reduced.reshape(-1) <= _sampled_bound(reduced, max_new_pairs // 2)
    return None


def _sinkhorn_potentials(
    cost: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The cost less potentials that are nearly optimal, and these: a few steps of Sinkhorn's algorithm (Cuturi 2013).

    They decide nothing but where the search begins, so that float32 is enough.

    Returns:
        C − u − v [n, m], u [n] and v [m].
    """
    n, m = cost.shape
    u, v = cost.mean(1), cost.mean(0)
    v -= v.mean()
    reduced = np.subtract(cost, u[:, None], out=SCRATCH.array("reduced costs", (n, m)))
    reduced -= v
    flat = reduced.reshape(-1)
    # Relative to the spread, so that costs in other units give the same steps.
    width = np.float32(_SMOOTHING * max(float(np.sqrt(flat @ flat / flat.size)), 1e-30))
    exponent = np.multiply(reduced, -_EXP_FACTOR / width, out=SCRATCH.array("exponents", (n, m)))
    # A pair that stands out must not drown all others.
    np.clip(exponent, -60 * _EXP_FACTOR, 40 * _EXP_FACTOR, out=exponent)
    exponent += _EXP_OFFSET
    kernel = SCRATCH.array("kernel", (n, m))
    kernel.view(np.int32)[...] = exponent
    column_scaling, power = np.ones(m, np.float32), np.float32(_OVER_RELAXATION)
    row_scaling = 1 / (kernel @ column_scaling)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        for _ in range(_SINKHORN_STEPS):
            column_scaling *= (np.float32(n / m) / (column_scaling * (row_scaling @ kernel))) ** power
            row_scaling *= (1 / (row_scaling * (kernel @ column_scaling))) ** power
        step_u, step_v = width * np.log(row_scaling), width * np.log(column_scaling)
    if np.isfinite(step_u).all() and np.isfinite(step_v).all():  # long steps may go astray
        reduced -= step_u[:, None]
        reduced -= step_v
        u, v = u + step_u, v + step_v
    return reduced, u.astype(np.float64), v.astype(np.float64)


def _first_pairs(reduced: npt.NDArray[np.float32], room: int) -> npt.NDArray[np.bool_]:
    """Where to begin, as a mask of all pairs [n·m].

    About `room` cheapest pairs, the cheapest of every row, and a plan that is possible.
    """
    n, m = reduced.shape
    bound = _sampled_bound(reduced, room)  # the rows' own least pairs come with it in one comparison
    grid: npt.NDArray[np.bool_] = reduced <= np.maximum(reduced.min(1), bound)[:, None]
    rows, columns, _ = ordered_entries(n, m)
    grid[rows, columns] = True
    return grid.reshape(-1)


def _sampled_bound(values: npt.NDArray[np.float32], count: int) -> np.float32:
    """A bound below which about `count` of the values lie, as a sample of them tells."""
    flat = values.reshape(-1)
    # An odd stride, so that the sample doesn't stay in a few columns of a matrix with an even number of them.
    sample = flat[:: flat.size // 8192 | 1]
    last = min(sample.size - 1, count * sample.size // flat.size)
    bound: np.float32 = np.partition(sample, last)[last]
    return bound


def check_installed() -> None:
    """Load what solves. Raises `MissingExtraError` if the extra `subflot` is not installed."""
    _load_pot()
    _load_assignment_solver()


@cache
def _load_pot() -> Any:
    """POT, imported without the tensor libraries that POT would load besides numpy."""
    names = [f"POT_BACKEND_DISABLE_{n}" for n in ("PYTORCH", "JAX", "TENSORFLOW", "CUPY")]
    added = [n for n in names if n not in os.environ] if {"ot", "torch"}.isdisjoint(sys.modules) else []
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        import ot
    except ImportError as error:
        raise MissingExtraError("transport plans need POT", extra="subflot") from error
    finally:
        # The variables are POT's own, but children of this process would inherit them.
        for name in added:
            del os.environ[name]
    return ot


@cache
def _load_assignment_solver() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtraError("transport plans need scipy", extra="subflot") from error
    return linear_sum_assignment  # type: ignore[no-any-return]
