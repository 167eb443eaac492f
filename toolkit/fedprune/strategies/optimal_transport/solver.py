"""Exact optimal transport between uniform marginals: the plan of least cost, as the earth mover's distance has it.

The plan is POT's (`ot.emd`, network simplex; SubFLOT, arXiv 2604.06631, Eq. 4). Large problems are solved on a fraction
of the pairs of channels (`fedprune.strategies.optimal_transport.column_generation`), small ones by dense solvers.
"""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import BundleError, shape_text
from fedprune.strategies.optimal_transport.column_generation import (
    MAX_PIVOTS,
    Cost,
    largest_cost,
    plan_by_columns,
    uniform_masses,
)
from fedprune.strategies.optimal_transport.coupling import Coupling
from fedprune.strategies.optimal_transport.solver_imports import load_assignment_solver, load_pot

# Pairs up to which the simplex is faster on all of them; the assignment solver is on up to three times as many.
SMALL_PAIRS = 88 * 88

# Costs whose largest is within 2^±20 are taken as they are.
_USUAL_EXPONENT = 20


def exact_plan(cost: Cost) -> Coupling:
    """The coupling of least total cost among those with uniform marginals. C [n, m] is the cost of moving all of source
    j to target k, in float32 or float64. Raises `BundleError` if it is no matrix of finite numbers, `MissingExtraError`
    if scipy or POT is not installed."""
    largest = largest_cost(cost) if cost.ndim == 2 and cost.size else np.nan
    if not np.isfinite(largest):
        raise BundleError(
            "costs of a transport plan", expected="a matrix of finite numbers", got=shape_text(*cost.shape)
        )
    n, m = cost.shape
    # One channel on a side leaves one plan.
    if n == 1 or m == 1:
        return Coupling.in_order(n, m)
    if (cheapest := _cheapest_plan(cost)) is not None:
        return cheapest
    # Unusually large or small costs times a power of two, which leaves the plan as it is. The squares of costs from
    # 1e17 overflow float32, and POT takes differences of 1e-14 for rounding.
    if abs(exponent := int(np.frexp(largest)[1])) > _USUAL_EXPONENT:
        cost = np.ldexp(cost, -exponent)
    # Equally many channels are an assignment problem, for which scipy has a faster solver.
    if n == m and cost.size <= 3 * SMALL_PAIRS:
        rows, columns = load_assignment_solver()(cost)
        return Coupling.of(n, m, rows, columns, np.ones(n))
    plan = plan_by_columns(cost) if cost.size > SMALL_PAIRS else None
    return _dense_plan(cost) if plan is None else plan


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


def _dense_plan(cost: Cost) -> Coupling:
    n, m = cost.shape
    sent_mass, received_mass = uniform_masses(n, m)
    costs = np.ascontiguousarray(cost, np.float64)
    plan, log = load_pot().emd(
        sent_mass, received_mass, costs, numItermax=MAX_PIVOTS, log=True, center_dual=False, check_marginals=False
    )
    if log["warning"]:
        raise BundleError("the transport plan was not found", got=str(log["warning"])[:200])
    rows, columns = np.nonzero(plan)
    return Coupling.of(n, m, rows, columns, plan[rows, columns])
