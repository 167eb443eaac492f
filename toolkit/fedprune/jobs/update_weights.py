"""What each update of a round counts for, and how far the model moves: the formulas behind a schedule's settings.

An update that was cut from the model of round r and enters the sums of round n has staleness k = n − r. With p_i a
device's importance (its samples, or 1), s_i = s(k_i) and η the schedule's `rate`, the next model is

    w ← w + ρ · Σ_i (v_i / Σ_j v_j) · d_i

where d_i is what an aggregator takes from an update: x_i − w for aggregators that average models (x_i is the trained
model), or x_i − w_{r_i}, the move away from what was sent, for aggregators that average moves. The step ρ and the
shares v, by the schedule's `mixing`:

| mixing | v_i | ρ |
|---|---|---|
| `damped` | p_i·s_i | η·Σ p_i·s_i / Σ p_i |
| `normalised` | p_i·s_i | η |
| `share` | p_i·s_i | η·Σ p_i·s_i / Σ over all devices of p_j·s_j |
| `unbiased` | p_i·ceil(τ_i / Δt) | η·Σ p_i·ceil(τ_i / Δt) / Σ over all devices of p_j |

`damped` is FedAsync's (Xie et al. 2019, Alg. 1: one update at a time, models) and FedBuff's (Nguyen et al. 2022, Alg.
1: K at a time, moves). `normalised` is PR-FL's: stale updates count for less than fresh ones, and the step stays whole.
`share` is PR-FL's reading of FedAsync and FedFix. `unbiased` is FedFix's own (Fraboni et al. 2022): a device whose
rounds take τ_i delivers in every ceil(τ_i / Δt)-th window, where Δt is the schedule's `window_s`.

s is at least 2^-50 and ρ at most 1000, so that a round can be closed whatever the configuration and the devices.

Shares enter the sums as whole numbers, since sums of whole weights don't depend on the order of arrival. Where all s
are 1 they are the samples themselves, and a sum of fresh updates of all devices is FedAvg's, bit for bit.
Otherwise they are v_i times the largest power of two with which all devices' shares stay within 2^24 in all, rounded: a
share is off by at most half a unit, which for N devices of equal importance is N·2^-24 of it for a fresh update (6e-7
for ten devices, 6e-5 for a thousand) and 1/s(k) times that for a stale one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.round_means import MAX_RATE
from fedprune.jobs.schedule import Schedule


@dataclass(frozen=True)
class Arrival:
    """An update that may enter the sums.

    Attributes:
        staleness: k, in aggregations.
        samples: n_i.
        seconds: τ_i, what its round took from the offer until the update was here; 0 where that is not known.
        share: s_i that it keeps, where staleness is frozen; 0 for one that has none yet.
    """

    staleness: int
    samples: int
    seconds: float = 0.0
    share: float = 0.0


def staleness_share(schedule: Schedule, arrival: Arrival) -> float:
    """s(k) of an update, above 0 and at most 1; what it keeps where staleness is frozen."""
    if schedule.staleness.frozen and arrival.share > 0:
        return arrival.share
    return schedule.staleness(arrival.staleness)


def update_weights(schedule: Schedule, arrivals: Sequence[Arrival], total: int, *, uniform: bool = False) -> list[int]:
    """The weight of each update in the sums: whole numbers from 1 up, `MAX_WEIGHT` at most in all.

    `total`: Σ n_j of all devices that could ever take part, or their number where they count alike: it decides how
    finely shares are resolved; `uniform`: devices count alike, whatever their samples.
    """
    shares = [_exact_share(schedule, a, uniform=uniform) for a in arrivals]
    is_exact = schedule.mixing == "unbiased" or all(staleness_share(schedule, a) == 1 for a in arrivals)
    scale = 2.0 ** min(0 if is_exact else math.inf, _scale_exponent(total))
    weights = [max(1, round(v * scale)) for v in shares]
    # Rounding each share up to 1 may exceed the sums' limit, where many devices have few samples.
    while sum(weights) > MAX_WEIGHT:
        scale /= 2
        weights = [max(1, round(v * scale)) for v in shares]
    return weights


def weights_fit(unbiased_weight: int, count: int, total: int) -> bool:
    """Whether `unbiased` shares certainly stay within `MAX_WEIGHT`, so that none depends on the others.

    `unbiased_weight` is Σ p_i·ceil(τ_i / Δt) of the updates that enter the sums, `count` their number, by which
    rounding may enlarge the sum.
    """
    return unbiased_weight * 2.0 ** min(0, _scale_exponent(total)) + count <= MAX_WEIGHT


def window_count(schedule: Schedule, arrival: Arrival) -> int:
    """ceil(τ_i / Δt), at least 1."""
    # 1e-9: a round that ends with its window must not count as two by a floating-point error.
    return max(1, math.ceil(arrival.seconds / schedule.window_s - 1e-9))


def step_size(
    schedule: Schedule, arrivals: Sequence[Arrival], other_arrivals: Sequence[Arrival], *, uniform: bool = False
) -> float:
    """ρ: the share of the way to the sums' mean that the model moves, above 0 and at most
    `aggregation.round_means.MAX_RATE`.

    Only `unbiased` shares, of rounds that last over a thousand windows, could exceed that limit.

    Args:
        other_arrivals: The last updates of all other devices that have ever delivered; of one that hasn't, a fresh
            one.
    """
    if schedule.mixing == "normalised" or not arrivals:
        return schedule.rate
    all_arrivals = (*arrivals, *other_arrivals)
    entering = math.fsum(_exact_share(schedule, a, uniform=uniform) for a in arrivals)
    if schedule.mixing == "share":
        total = math.fsum(_exact_share(schedule, a, uniform=uniform) for a in all_arrivals)
    else:
        summed = arrivals if schedule.mixing == "damped" else all_arrivals
        total = math.fsum(_importance(a, uniform=uniform) for a in summed)
    return min(max(schedule.rate * entering / total, sys.float_info.min), MAX_RATE)


def _exact_share(schedule: Schedule, arrival: Arrival, *, uniform: bool) -> float:
    """v_i of an update, before it is scaled and rounded."""
    factor = window_count(schedule, arrival) if schedule.mixing == "unbiased" else staleness_share(schedule, arrival)
    return factor * _importance(arrival, uniform=uniform)


def _importance(arrival: Arrival, *, uniform: bool) -> int:
    return 1 if uniform else max(1, arrival.samples)


def _scale_exponent(total: int) -> int:
    """The largest power of two with which a whole fleet's shares stay within `MAX_WEIGHT`."""
    return math.floor(math.log2(MAX_WEIGHT / max(1, total)))
