"""The ε that a number of noisy releases costs, at a δ (differential privacy).

Releases with noise multipliers z_1, z_2, ..., each chosen with knowledge of the earlier ones, cost as much as a single
one with multiplier 1/μ, μ² = Σ 1/z² (Dong et al. 2019, Corollary 3.3). Its δ at an ε is

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)

(Balle and Wang 2018, Theorem 8). If the second term is too small for a float, it counts as 0, which never makes the
cost too small. There is no discount for devices that a round doesn't ask (no amplification by sampling).

In this module `cost` is μ²: 0 without a release, and infinite with a release without noise.
"""

from __future__ import annotations

import math

# Bisections: floats run out of bits earlier, which ends the loop.
_MAX_BISECTIONS = 200

# Beyond this e^ε is too large for a float.
_MAX_EXPONENT = 700.0


def delta_for(cost: float, epsilon: float) -> float:
    """δ at an ε of at least 0, for a cost above 0."""
    mu = math.sqrt(cost)
    first, second = _tail(epsilon / mu - mu / 2), _tail(epsilon / mu + mu / 2)
    return first - (math.exp(epsilon) * second if second and epsilon < _MAX_EXPONENT else 0.0)


def epsilon_for(cost: float, delta: float) -> float:
    """The least ε that holds at a δ."""
    if cost <= 0:
        return 0.0
    if not math.isfinite(cost):
        return math.inf
    # An upper bound for any cost: zero-concentrated privacy of ρ = cost/2 (Bun and Steinke 2016, Proposition 1.3).
    low, high = 0.0, cost / 2 + math.sqrt(2 * cost * math.log(1 / delta))
    if delta_for(cost, 0.0) <= delta:
        return 0.0
    for _ in range(_MAX_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if delta_for(cost, middle) <= delta else (middle, high)
    return high  # the upper end: rounding must not promise too much


def max_cost(epsilon: float, delta: float) -> float:
    """The largest cost that doesn't exceed ε at a δ."""
    low, high = 0.0, 1.0
    while epsilon_for(high, delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(_MAX_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if epsilon_for(middle, delta) <= epsilon else (low, middle)
    return low


def _tail(value: float) -> float:
    """P(N(0, 1) > value)."""
    return 0.5 * math.erfc(value / math.sqrt(2))
