"""Solves a large transport problem on few of its n·m pairs of channels (column generation).

A *plan* says how much of each source channel goes to each target channel. A *potential* is a price per channel; a
pair's *reduced cost* is its cost less both prices.

1. The network simplex gets the cheapest few pairs of every channel: an optimal plan uses fewer than n + m pairs.
2. Its dual potentials u, v say whether another pair could help. If C_jk ≥ u_j + v_k for all pairs, the plan is optimal
   for the whole matrix, by linear programming duality. Otherwise the pairs that break it are added, and step 1 is
   repeated.

The costs that the simplex gets are reduced by potentials from a few steps of Sinkhorn's algorithm. These change the
cost of every plan by the same amount, so that the best plan stays the best, but the simplex begins close to it.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.strategies.optimal_transport.coupling import SCRATCH, Coupling, ordered_entries
from fedprune.strategies.optimal_transport.solver_imports import load_pot

Indices = npt.NDArray[np.int64]
Cost = npt.NDArray[np.floating[Any]]

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
MAX_PIVOTS = 10_000_000

# How far below 0 a reduced cost may be by rounding alone, relative to the largest cost.
_COST_TOLERANCE = 1e-9


def largest_cost(cost: Cost) -> float:
    """The largest absolute cost; NaN or infinite if any of them is."""
    return float(max(cost.max(), -cost.min()))


def uniform_masses(n: int, m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Uniform marginals in whole units, with which the simplex adds without rounding."""
    common = gcd(n, m)
    return np.full(n, float(m // common)), np.full(m, float(n // common))


def plan_by_columns(cost: Cost) -> Coupling | None:
    """The plan by column generation; None where it does not end soon."""
    pot = load_pot().lp.emd_wrap  # `ot.emd` makes sparse matrices, which takes as long as a small problem
    n, m = cost.shape
    sent_mass, received_mass = uniform_masses(n, m)
    cost32 = np.ascontiguousarray(cost, np.float32)
    flat = cost.reshape(-1)
    scale = largest_cost(cost32)
    max_new_pairs = _PAIRS_PER_CHANNEL * (n + m)
    reduced, sinkhorn_u, sinkhorn_v = _sinkhorn_potentials(cost32)
    is_used = _first_pairs(reduced, max_new_pairs // 2)
    for _ in range(_MAX_ROUNDS):
        pairs = np.flatnonzero(is_used)
        rows, columns = np.divmod(pairs, m)
        # Less the potentials, which move the cost of every plan by the same.
        costs = flat[pairs] - sinkhorn_u[rows] - sinkhorn_v[columns]
        i, j, flow, _, u, v, status = pot.emd_c_sparse(
            sent_mass, received_mass, rows.astype(np.uint64), columns.astype(np.uint64), costs, MAX_PIVOTS
        )
        if pot.check_result(status):
            return None
        u += sinkhorn_u
        v += sinkhorn_v
        np.subtract(cost32, u.astype(np.float32)[:, None], out=reduced)
        # float32 finds the pairs whose reduced cost may be negative, float64 tells which of them are.
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
        new_pairs = suspects
        if suspects.size > max_new_pairs:  # the worst come first: all of them would make the problem dense
            new_pairs = suspects[np.argpartition(reduced_costs, max_new_pairs)[:max_new_pairs]]
        is_used[new_pairs] = True
        if suspects.size < max_new_pairs:  # pairs that come near may be the next to break it
            reduced -= v.astype(np.float32)
            is_used |= reduced.reshape(-1) <= _sampled_bound(reduced, max_new_pairs // 2)
    return None


def _sinkhorn_potentials(
    cost: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """C − u − v [n, m], and potentials u [n] and v [m] that are nearly optimal: a few steps of Sinkhorn's algorithm
    (Cuturi 2013). They decide only where the search begins, so that float32 is enough."""
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


def _first_pairs(reduced: npt.NDArray[np.float32], max_pairs: int) -> npt.NDArray[np.bool_]:
    """Where to begin, as a mask of all pairs [n·m]: about `max_pairs` cheapest pairs, the cheapest of every row, and
    the pairs of a plan that is possible."""
    n, m = reduced.shape
    bound = _sampled_bound(reduced, max_pairs)  # the rows' own least pairs come with it in one comparison
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
