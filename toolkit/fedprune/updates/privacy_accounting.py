"""What releases under Gaussian noise cost: ε at a δ, in plain mathematics that every board can do.

Releases of noise multipliers z_1, z_2, ..., each chosen in the light of those before, cost as much as a single one of
multiplier 1/μ with μ² = Σ 1/z² (Dong et al. 2019, Corollary 3.3), and that one's δ at an ε is

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)

(Balle and Wang 2018, Theorem 8). Where the second part is too small for a float it is taken for 0, which says too
much and never too little. Nothing is taken off for devices that a round doesn't ask.
"""

from __future__ import annotations

import math

_HALVES = 200
_FAR = 700.0
"""Beyond this e^ε is too large for a float."""


def delta(cost: float, epsilon: float) -> float:
    """δ at an ε from 0; `cost` is Σ 1/z², above 0."""
    mu = math.sqrt(cost)
    first, second = _tail(epsilon / mu - mu / 2), _tail(epsilon / mu + mu / 2)
    return first - (math.exp(epsilon) * second if second and epsilon < _FAR else 0.0)


def epsilon(cost: float, delta_: float) -> float:
    """The least ε that is promised at a δ; `cost` is Σ 1/z², 0 for nothing and infinite where there was no noise."""
    if cost <= 0:
        return 0.0
    if not math.isfinite(cost):
        return math.inf
    # Enough for any cost: zero-concentrated privacy of ρ = cost/2 (Bun and Steinke 2016, Proposition 1.3).
    low, high = 0.0, cost / 2 + math.sqrt(2 * cost * math.log(1 / delta_))
    if delta(cost, 0.0) <= delta_:
        return 0.0
    for _ in range(_HALVES):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if delta(cost, middle) <= delta_ else (middle, high)
    return high


def most_cost(epsilon_: float, delta_: float) -> float:
    """The most that Σ 1/z² may be, so that ε is no larger; arguments are those of `epsilon`."""
    low, high = 0.0, 1.0
    while epsilon(high, delta_) <= epsilon_:
        low, high = high, 2 * high
    for _ in range(_HALVES):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if epsilon(middle, delta_) <= epsilon_ else (low, middle)
    return low


def _tail(value: float) -> float:
    """P(N(0, 1) > value)."""
    return 0.5 * math.erfc(value / math.sqrt(2))
