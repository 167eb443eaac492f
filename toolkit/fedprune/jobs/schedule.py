"""The settings of a job's schedule: when devices get offers, when a round closes, and how stale updates count.

Synchronous rounds ask a share of the devices and wait for all of them, up to a deadline. In an asynchronous job every
idle device is offered the current model at once, and the model moves when enough updates have arrived, or at the end of
a window. `jobs.update_weights` computes from these settings what each update counts for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedprune.aggregation.round_means import MAX_RATE
from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, check_fields

ScheduleKind = Literal["synchronous", "asynchronous"]
Decay = Literal["constant", "polynomial", "hinge"]
Mixing = Literal["damped", "normalised", "share", "unbiased"]

# Lower bound of s(k). A large exponent would round it to 0, and a round of only such updates could not be closed.
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
        check_fields(self, ("job", "schedule", "staleness"))

    def __call__(self, k: int) -> float:
        """s(k), from 2^-50 to 1, for k aggregations since the model that the update was trained from; below 0 counts as
        0."""
        k = max(0, k)
        if self.decay == "polynomial":
            return max(_MIN_SHARE, float((k + 1.0) ** -self.a))
        if self.decay == "hinge":
            return 1.0 if k <= self.b else max(_MIN_SHARE, 1.0 / (self.a * (k - self.b) + 1.0))
        return 1.0


@dataclass(frozen=True)
class Schedule:
    """When offers go out and rounds close.

    Attributes:
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
        check_fields(self, ("job", "schedule"))
        if self.asynchronous and bool(self.arrivals) == bool(self.window_s):
            raise ConfigError(
                "an asynchronous job closes its rounds by arrivals or at the end of a window",
                path=("job", "schedule"),
                expected="either arrivals or window_s",
                got="both" if self.arrivals else "neither",
            )
        if self.concurrent and self.arrivals > self.concurrent:
            raise ConfigError(
                ("job", "schedule", "arrivals"), expected=f"at most concurrent, {self.concurrent}", got=self.arrivals
            )
        if self.mixing == "unbiased" and not self.window_s:
            raise ConfigError(
                "'unbiased' counts windows", path=("job", "schedule", "mixing"), expected="window_s above 0", got=0
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
        values = validation.check_table(cls, body, ("job", "schedule"))
        if "staleness" in values:
            staleness = validation.check_table(Staleness, values["staleness"], ("job", "schedule", "staleness"))
            values["staleness"] = Staleness(**staleness)
        return cls(**values)

    def closes_at(self, opened_at: float, arrival_times: Sequence[float], is_awaited: bool, now: float) -> float | None:
        """The time at which the round that collects updates closes; None where that depends on what is still to come.

        `arrival_times` are those of its updates, sorted; some may have come before it was opened. The round waits for
        no more than can come: a device trains a model once, so if no update is awaited none follows.
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

    def accepts_staleness(self, staleness: int) -> bool:
        """Whether an update of this staleness still counts."""
        return not self.max_staleness or staleness <= self.max_staleness


# The schedule of strategies without one: synchronous rounds, as the job's own keys describe them.
SYNCHRONOUS_SCHEDULE = Schedule()
