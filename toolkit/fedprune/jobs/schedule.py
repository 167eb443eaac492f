"""A job's schedule: when a round closes, and how much each update weighs in the next model.

Synchronous rounds ask a share of the devices and wait for all of them, up to a deadline. In an asynchronous job every
idle device is offered the current model at once, and the server moves whenever enough has arrived, or at the end of a
window. An update that was cut from the model of round r and enters the sums of round n has staleness k = n − r.

With p_i a device's importance (its samples, or 1), s_i = s(k_i) and η the schedule's `rate`, the next model is

    w ← w + ρ · Σ_i (v_i / Σ_j v_j) · d_i

where d_i is what an aggregator takes from an update: x_i − w for those that average models (x_i what was trained), or
x_i − w_{r_i}, the move away from what was sent, for those that average moves. Shares v and the step ρ are

| mixing | v_i | ρ |
|---|---|---|
| `damped` | p_i·s_i | η·Σ p_i·s_i / Σ p_i |
| `normalised` | p_i·s_i | η |
| `share` | p_i·s_i | η·Σ p_i·s_i / Σ over all devices of p_j·s_j |
| `unbiased` | p_i·ceil(τ_i / Δt) | η·Σ p_i·ceil(τ_i / Δt) / Σ over all devices of p_j |

`damped` is FedAsync's (Xie et al. 2019, Alg. 1: one update at a time, models) and FedBuff's (Nguyen et al. 2022, Alg.
1: K at a time, moves). `normalised` is PR-FL's: stale updates count for less than fresh ones, and the step stays whole.
`share` is PR-FL's reading of FedAsync and FedFix, and `unbiased` FedFix's own (Fraboni et al. 2022): whose
rounds take τ_i comes in every ceil(τ_i / Δt)-th window.

s is at least 2^-50 and ρ at most 1000, so that a round can be closed whatever the configuration and the devices.

Shares enter the sums as whole numbers, since sums of whole weights don't depend on the order of arrival. Where all s
are 1 they are the samples themselves, and an aggregation of everybody's fresh updates is FedAvg's, bit for bit.
Elsewhere they are v_i times the largest power of two with which all devices' shares stay within 2^24 in all, rounded: a
share is off by at most half a unit, which for N devices of equal importance is N·2^-24 of it for a fresh update (6e-7
for ten devices, 6e-5 for a thousand) and 1/s(k) times that for a stale one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.round_means import MAX_RATE
from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, check_fields

ScheduleKind = Literal["synchronous", "asynchronous"]
Decay = Literal["constant", "polynomial", "hinge"]
Mixing = Literal["damped", "normalised", "share", "unbiased"]

# Lower bound of s(k). A large exponent would round it to 0, and a round of such updates
# alone could not be closed.
_MIN_SHARE = 2.0**-50


@dataclass(frozen=True)
class Staleness:
    """How much less an update counts for that is of an earlier model (FedAsync, Xie et al. 2019, Sec. 5.2).

    Attributes:
        decay: `constant`: s(k) = 1. `polynomial`: s(k) = (k + 1)^-a. `hinge`: 1 up to k = b, then 1 / (a·(k − b) + 1).
        a: How fast it falls.
        b: Where the hinge is.
        frozen: A kept update (`Schedule.keep`) goes on counting for what it counted when it came, instead of becoming
            staler in every round.
    """

    decay: Decay = "constant"
    a: float = bounded(0.5, 0, 1e6)
    b: int = bounded(4, 0, 10**6)
    frozen: bool = False

    def __post_init__(self) -> None:
        check_fields(self, ("staleness",))

    def __call__(self, k: int) -> float:
        """s(k), at least 2^-50 and at most 1.

        Args:
            k: Aggregations since the model that the update was trained from; below 0 counts as 0.
        """
        k = max(0, k)
        if self.decay == "polynomial":
            return max(_MIN_SHARE, float((k + 1.0) ** -self.a))
        if self.decay == "hinge":
            return 1.0 if k <= self.b else max(_MIN_SHARE, 1.0 / (self.a * (k - self.b) + 1.0))
        return 1.0


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


@dataclass(frozen=True)
class Schedule:
    """When offers go out and rounds close.

    Attributes:
        kind: `synchronous` or `asynchronous`.
        participation: Synchronous: share of the present devices that a round asks; 0 leaves it to the job.
        arrivals: Asynchronous: a round closes with this many updates; 0 leaves that to the window.
        window_s: Seconds from the beginning of a round to its close; 0 for no window.
        least: With fewer updates a window stays open.
        extension_s: How long it stays open after the update that was missing; 0 for `window_s` once more.
        keep: Every device's last update enters every round (PR-FL's buffers), not only those that have just arrived.
        staleness: What stale updates count for.
        max_staleness: Updates staler than this don't count, and devices that are so late get a new offer; 0 for none.
        mixing: What an update's share of the next model is. `damped`: less where it is stale, and the step is shorter
            by as much. `normalised`: less where it is stale, at whole steps. `share`: its share of all
            devices' weights. `unbiased`: by how many windows its device takes.
        rate: η, the server's rate: FedAsync's α, FedBuff's and FedFix's η_g.
        concurrent: How many devices work at a time; 0 for all.
        score_every: Rounds between rankings of channels and elements, unless the allocator asks for one earlier.
        evaluate_every: Rounds between evaluations of the model, which also follow the last round.
    """

    kind: ScheduleKind = "synchronous"
    participation: float = bounded(0.0, 0, 1)
    arrivals: int = bounded(0, 0, 10**6)
    window_s: float = bounded(0.0, 0, 1e8)
    least: int = bounded(1, 1, 10**6)
    extension_s: float = bounded(0.0, 0, 1e8)
    keep: bool = False
    staleness: Staleness = field(default_factory=Staleness)
    max_staleness: int = bounded(0, 0, 10**6)
    mixing: Mixing = "normalised"
    rate: float = bounded(1.0, 0, MAX_RATE, above=True)
    concurrent: int = bounded(0, 0, 10**6)
    score_every: int = bounded(1, 1, 10**6)
    evaluate_every: int = bounded(1, 1, 10**6)

    def __post_init__(self) -> None:
        check_fields(self, ("schedule",))
        if self.asynchronous and bool(self.arrivals) == bool(self.window_s):
            raise ConfigError(
                "an asynchronous job closes its rounds by arrivals or at the end of a window",
                path=("schedule",),
                expected="either arrivals or window_s",
                got="both" if self.arrivals else "neither",
            )
        if self.concurrent and self.arrivals > self.concurrent:
            raise ConfigError(
                ("schedule", "arrivals"), expected=f"at most concurrent, {self.concurrent}", got=self.arrivals
            )
        if self.mixing == "unbiased" and not self.window_s:
            raise ConfigError(
                "'unbiased' counts windows", path=("schedule", "mixing"), expected="window_s above 0", got=0
            )

    @property
    def asynchronous(self) -> bool:
        """Whether offers go out at once, instead of round by round."""
        return self.kind == "asynchronous"

    @property
    def step_needs_all_devices(self) -> bool:
        """Whether a step depends on the devices whose updates don't enter the sums."""
        return self.mixing in ("share", "unbiased")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Schedule:
        """Read what `to_dict` or a person wrote. Raises `ConfigError` for an unknown key or a wrong value; the message
        names it."""
        values = validation.check_table(cls, body, ("schedule",))
        if isinstance(values.get("staleness"), Mapping):
            staleness = validation.check_table(Staleness, values["staleness"], ("schedule", "staleness"))
            values["staleness"] = Staleness(**staleness)
        return cls(**values)

    # When a round closes.

    def closes_at(self, opened_at: float, arrival_times: Sequence[float], is_awaited: bool, now: float) -> float | None:
        """The time at which the round that collects updates closes.

        It waits for no more than can come: a device trains a model once, so if none is at work no update follows.

        Args:
            opened_at: When it began.
            arrival_times: When its updates came, sorted; some may have come before it began.
            is_awaited: Whether an update of any device is still awaited.
            now: The present.

        Returns:
            A time, not after `now` where it is time to close; None where that depends on what is still to come.
        """
        if not arrival_times:
            return None
        if self.arrivals:
            return now if len(arrival_times) >= self.arrivals or not is_awaited else None
        end = opened_at + self.window_s
        if len(arrival_times) < self.least:
            return None if is_awaited else end
        last_needed = arrival_times[self.least - 1]
        if last_needed <= end or not is_awaited:
            return max(end, last_needed)
        return last_needed + (self.extension_s or self.window_s)

    # What counts for how much.

    def staleness_share(self, arrival: Arrival) -> float:
        """s(k) of an update, above 0 and at most 1; what it keeps where staleness is frozen."""
        if self.staleness.frozen and arrival.share > 0:
            return arrival.share
        return self.staleness(arrival.staleness)

    def accepts_staleness(self, staleness: int) -> bool:
        """Whether an update of this staleness still counts."""
        return not self.max_staleness or staleness <= self.max_staleness

    def weights(self, arrivals: Sequence[Arrival], total: int, *, uniform: bool = False) -> list[int]:
        """The weight of each update in the sums: whole numbers from 1 up, `MAX_WEIGHT` at most in all.

        Args:
            arrivals: The updates that enter the sums.
            total: Σ n_j of all devices that could ever take part, or their number where they count alike: it decides
                how finely shares are resolved.
            uniform: Devices count alike, whatever their samples.
        """
        factors = [self._weight_factor(a) * (1 if uniform else max(1, a.samples)) for a in arrivals]
        is_exact = self.mixing == "unbiased" or all(self.staleness_share(a) == 1 for a in arrivals)
        scale = 2.0 ** min(0 if is_exact else math.inf, _scale_exponent(total))
        weights = [max(1, round(f * scale)) for f in factors]
        # Rounding each share up to 1 may exceed the sums' limit, where many devices have few samples.
        while sum(weights) > MAX_WEIGHT:
            scale /= 2
            weights = [max(1, round(f * scale)) for f in factors]
        return weights

    def weights_fit(self, unbiased_weight: int, count: int, total: int) -> bool:
        """Whether `unbiased` shares certainly stay within `MAX_WEIGHT`, so that none depends on the others.

        Args:
            unbiased_weight: Σ p_i·ceil(τ_i / Δt) of the updates that enter the sums.
            count: Their number, by which rounding may enlarge the sum.
            total: As in `weights`.
        """
        return unbiased_weight * 2.0 ** min(0, _scale_exponent(total)) + count <= MAX_WEIGHT

    def window_count(self, arrival: Arrival) -> int:
        """ceil(τ_i / Δt), at least 1."""
        # 1e-9: a round that ends with its window must not count as two by a floating-point error.
        return max(1, math.ceil(arrival.seconds / self.window_s - 1e-9))

    def step_size(
        self, arrivals: Sequence[Arrival], other_arrivals: Sequence[Arrival], *, uniform: bool = False
    ) -> float:
        """ρ: the share of the way to the sums' mean that the model moves, above 0 and at most
        `aggregation.round_means.MAX_RATE`.

        Only `unbiased` shares of rounds that last over a thousand windows could be more than the latter.

        Args:
            arrivals: The updates that enter the sums.
            other_arrivals: The last updates of all other devices that have ever delivered; of one that hasn't, a fresh
                one.
            uniform: As in `weights`.
        """

        def importance(a: Arrival) -> float:
            return 1.0 if uniform else float(max(1, a.samples))

        if self.mixing == "normalised" or not arrivals:
            return self.rate
        entering = math.fsum(importance(a) * self._weight_factor(a) for a in arrivals)
        if self.mixing == "damped":
            total = math.fsum(importance(a) for a in arrivals)
        elif self.mixing == "share":
            total = math.fsum(importance(a) * self._weight_factor(a) for a in (*arrivals, *other_arrivals))
        else:
            total = math.fsum(importance(a) for a in (*arrivals, *other_arrivals))
        return min(max(self.rate * entering / total, sys.float_info.min), MAX_RATE)

    def _weight_factor(self, arrival: Arrival) -> float:
        if self.mixing == "unbiased":
            return float(self.window_count(arrival))
        return self.staleness_share(arrival)


def _scale_exponent(total: int) -> int:
    """The largest power of two with which a whole fleet's shares stay within `MAX_WEIGHT`."""
    return math.floor(math.log2(MAX_WEIGHT / max(1, total)))


# The schedule of strategies without one: synchronous rounds, as the job's own keys describe them.
SYNCHRONOUS_SCHEDULE = Schedule()
