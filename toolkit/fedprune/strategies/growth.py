"""Densities that change with time: with the length of rounds, and with what is left to learn (PR-FL, arXiv 2403.15439).

If a score has not become better in P checks, a device's submodel, or the whole model, is too small to learn more.
Scores come from devices' validation samples, never from test samples: what they decide would otherwise have seen the
test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.core.metrics import credible_metrics, primary_metric
from fedprune.core.settings import bounded, check_fields
from fedprune.jobs.state import DeviceTask, JobDevice, State
from fedprune.strategies.allocation import TIMES, Allocator, Fixed, Fleet, Tiers

# Entry of `Device.allocation`: the device's last score.
SCORE = "score"

# Entry of `State.allocation`: ρ_min, which only rises.
FLOOR = "floor"

# Further entries: what early stopping remembers, a device's density, whether stage 1 is over, and all training.
_WATCH, _GRANTED, _FROZEN, _DONE = "watch", "granted", "frozen", "done"

# Times that are within this share of the wanted one are equal to it.
TIME_TOLERANCE = 0.05


@dataclass(frozen=True)
class Recovery:
    """Growth by early stopping.

    Every check compares each device's own score and the mean score with their best so far. A device whose score has not
    become better in P checks grows: ρ_i ← ρ_i + Δρ. If the mean score has not, the floor of all devices grows. When
    all devices have the whole model, and the mean score does not become better in 8·P checks, training is done.

    The mean is over devices' validation samples, each device by its samples, without the quarter with the lowest and
    the quarter with the highest scores (one of three devices, none of two), so that no board's word alone decides when
    all grow. A score that equals the one of the last check is ignored: no update came in between.

    Attributes:
        patience: P, in checks.
        delta: Δρ.
    """

    patience: int = bounded(10, 1, 10**6)
    delta: float = bounded(0.2, 0, 1, above=True)

    def __post_init__(self) -> None:
        check_fields(self, ("recovery",))

    def next_density(self, density: float) -> float:
        """The next density, 1 at most."""
        # Rounded, so that 0.1 + 0.2 is 0.3 and not a density of its own.
        return min(1.0, round(density + self.delta, 9))

    def learn(self, device: JobDevice, metrics: Mapping[str, float]) -> None:
        """Keep the score of an update, if it brought one."""
        new_score = score_of_metrics(metrics, "_validation")
        if new_score is not None:
            device.allocation = {**device.allocation, SCORE: new_score}

    def review(self, state: State, min_density: float) -> dict[str, float]:
        """Check all scores.

        Args:
            state: Its devices' and its own `allocation` are replaced.
            min_density: ρ_min, as far as nothing has made it grow.

        Returns:
            Devices that grow, with their new densities.
        """
        members = {n: d for n, d in sorted(state.devices.items()) if d.widths and not d.excluded}
        if not members:
            return {}
        new_densities: dict[str, float] = {}
        for name, device in members.items():
            watch_state, fired = watch_score(
                device.allocation.get(_WATCH, {}), device.allocation.get(SCORE), self.patience
            )
            device.allocation = {**device.allocation, _WATCH: watch_state}
            if fired and device.density < 1:
                new_densities[name] = self.next_density(device.density)
        floor = self._review_fleet(state, members, min_density)
        for name, device in members.items():
            # Whoever grows by its own score above the floor keeps that density.
            if max(device.density, new_densities.get(name, 0.0)) < floor:
                new_densities[name] = floor
        return new_densities

    def _review_fleet(self, state: State, members: Mapping[str, JobDevice], min_density: float) -> float:
        """Check the mean score, and return the floor.

        It rises from the sparsest device's density: otherwise no device's density would follow.
        """
        allocation = dict(state.allocation)
        floor = max(float(allocation.get(FLOOR, 0.0)), min_density)
        sparsest = max(floor, min(d.density for d in members.values()))
        # The code has 8·P, 5·P and 2·P by how ρ_min came to be 1; one patience, the longest, serves all
        # (docs/strategies/pr-fl.md).
        patience = self.patience if sparsest < 1 else 8 * self.patience
        watch_state, fired = watch_score(allocation.get(_WATCH, {}), _mean_score(members), patience)
        if fired and sparsest >= 1:
            allocation[_DONE] = True
        elif fired:
            floor = self.next_density(sparsest)
        state.allocation = {**allocation, FLOOR: floor, _WATCH: watch_state}
        return floor


def watch_score(old_state: Mapping[str, Any], new_score: float | None, patience: int) -> tuple[dict[str, Any], bool]:
    """Check a score once for early stopping.

    Args:
        old_state: What the last check returned; empty at first.
        new_score: The score, more is better; None without one.
        patience: After this many checks without a better score it fires, and starts to count again.

    Returns:
        What to remember, as JSON, and whether it fires.
    """
    best_score, last_score = old_state.get("best"), old_state.get("last")
    count = int(old_state.get("count", 0))
    fired = False
    # The same score again means that no update came in between: neither better nor a failed check.
    if new_score is not None and new_score != last_score:
        last_score = new_score
        if best_score is None or new_score > best_score:
            best_score, count = new_score, 0
        else:
            count += 1
            fired = count >= patience
            # A device that has just grown gets P checks again before it may grow once more.
            count = 0 if fired else count
    return {"best": best_score, "last": last_score, "count": count}, fired


def score_of_metrics(metrics: Mapping[str, float], suffix: str = "") -> float | None:
    """The leading metric as a score, of which more is better; None without one.

    The sign of a metric of which less is better is turned.
    """
    leading_metric = primary_metric(credible_metrics(metrics), suffix)
    if leading_metric is None:
        return None
    metric, value = leading_metric
    return value if metric.higher_is_better else -value


def _mean_score(members: Mapping[str, JobDevice]) -> float | None:
    """The mean of the middle scores, by samples: no single board's score or number of samples can move it far."""
    weighted_scores = sorted(
        (d.allocation[SCORE], max(1, d.samples)) for d in members.values() if SCORE in d.allocation
    )
    if not weighted_scores:
        return None
    # With three devices one is left out at each end, with two none: the mean must keep at least one.
    trimmed_count = (len(weighted_scores) + 1) // 4
    middle = weighted_scores[trimmed_count : len(weighted_scores) - trimmed_count]
    return math.fsum(s * n for s, n in middle) / sum(n for _, n in middle)


# What devices begin with.
StartAllocator = Fixed | Tiers


@dataclass(frozen=True)
class TimeDriven(Allocator):
    """Densities at which all devices take equally long (PR-FL, stage 1), then growing ones (stage 2).

    Every I rounds ρ_i ← clip(ρ_i·T / t_i, ρ_min, 1), with t_i the mean of the last I times from offer to update at
    the present density, and T = min_j t_j / ρ_j: what the fastest would take for the whole model. That is the paper's
    min_j t_j / t_i, of times as they would be without pruning. A device that is faster than T gets more of the model.
    So a density rises again when a slow link has recovered, and the fastest device always has the whole model. When
    all times are equal, no density changes. After the first growth (stage 2), times no longer change densities.

    Attributes:
        start: What devices begin with.
        recovery: When and how they grow; None for never.
        interval: I: rounds between checks.
        floor: ρ_min: no density goes below it.
        power: Times go with ρ to this power, at most: 1 where elements are masked, 2 where channels are left out, whose
            work and weights are products of two widths. Then T = min_j t_j / ρ_j², and the root of T / t_i counts.
            Otherwise densities would overshoot and oscillate.
    """

    start: StartAllocator = field(default_factory=Fixed)
    recovery: Recovery | None = field(default_factory=Recovery)
    interval: int = bounded(50, 1, 10**6)
    floor: float = bounded(0.1, 0, 1, above=True)
    power: float = bounded(1.0, 1, 2)

    def __post_init__(self) -> None:
        check_fields(self, ("allocator",))

    @property
    def masks_elements(self) -> bool:
        return self.start.masks_elements

    def admit(self, fleet: Fleet, name: str, previous: JobDevice | None) -> None:
        """Grant the density that the device had, or its initial one, and no less than the current minimum."""
        device = fleet.state.devices[name]
        # A device that announces itself again has its earned density, not the start's: links break often.
        granted_density = device.allocation.get(_GRANTED)
        if granted_density is None:
            self.start.admit(fleet, name, previous)
            granted_density = device.density
        self._grant(fleet, name, max(float(granted_density), self._density_floor(fleet)))

    def open(self, fleet: Fleet) -> bool:
        """Deal densities by the devices' names before the first round; later nothing changes here."""
        if fleet.state.round > 1 or not self.start.open(fleet):
            return False
        for name, device in fleet.state.devices.items():
            self._grant(fleet, name, max(device.density, self._density_floor(fleet)))
        return True

    def learn(self, fleet: Fleet, name: str, task: DeviceTask, seconds: float | None) -> None:
        """Keep the device's validation score, and its time if that was measured at the present density."""
        device = fleet.state.devices[name]
        if self.recovery is not None:
            self.recovery.learn(device, task.metrics)
        # An update of an older, wider submodel may arrive after its device was narrowed.
        if seconds is not None and seconds > 0 and (task.density, task.widths) == (device.density, device.widths):
            times = [*device.allocation.get(TIMES, []), seconds][-self.interval :]
            device.allocation = {**device.allocation, TIMES: times}

    def review(self, fleet: Fleet, metrics: Mapping[str, float]) -> bool:
        """Grow densities (stage 2); balance them (stage 1) as long as none has grown."""
        state, grown = fleet.state, False
        # Checks are an interval apart: a density needs that many times to average over.
        if state.round % self.interval:
            return False
        if self.recovery is not None:
            for name, density in self.recovery.review(state, self._growth_floor(fleet)).items():
                grown |= self._grant(fleet, name, density)
        if grown and not state.allocation.get(_FROZEN):
            # From the first growth on, balancing rests: it would take away what early stopping gives.
            state.allocation = {**state.allocation, _FROZEN: True}
        return grown if state.allocation.get(_FROZEN) else self._balance(fleet) or grown

    def done(self, fleet: Fleet) -> bool:
        """Whether the whole model has learnt what it can."""
        return self.recovery is not None and bool(fleet.state.allocation.get(_DONE))

    def _balance(self, fleet: Fleet) -> bool:
        means = {
            name: math.fsum(device.allocation[TIMES]) / len(device.allocation[TIMES])
            for name, device in sorted(fleet.state.devices.items())
            if device.online and not device.excluded and device.allocation.get(TIMES)
        }
        if not means:
            return False
        current_densities = {name: fleet.state.devices[name].density for name in means}
        full_model_time = min(seconds / current_densities[name] ** self.power for name, seconds in means.items())
        changed = False
        for name, seconds in means.items():
            density = balanced_density(current_densities[name], full_model_time / seconds, self.power)
            changed |= self._grant(fleet, name, min(1.0, max(density, self._density_floor(fleet))))
        return changed

    def _growth_floor(self, fleet: Fleet) -> float:
        """The density from which all devices grow: the least of them, once one has grown, and ρ_min before that.

        Before the first growth, balancing may still lower any density to ρ_min.
        """
        if not fleet.state.allocation.get(_FROZEN):
            return self.floor
        densities = (d.density for d in fleet.state.devices.values() if d.widths and not d.excluded)
        return max(self.floor, min(densities, default=0.0))

    def _density_floor(self, fleet: Fleet) -> float:
        """The floor of all densities. A density that has grown needs none: from then on none falls."""
        return max(self.floor, float(fleet.state.allocation.get(FLOOR, 0.0)))

    def _grant(self, fleet: Fleet, name: str, density: float) -> bool:
        device = fleet.state.devices[name]
        if device.excluded:
            return False
        changed = fleet.grant(name, density, masks_elements=self.masks_elements)
        if device.allocation.get(_GRANTED) != density:
            device.allocation = {**device.allocation, _GRANTED: density}
        return changed


def balanced_density(density: float, ratio: float, power: float = 1.0) -> float:
    """A density at which a device takes the wanted time (PR-FL, stage 1).

    Args:
        density: The present one.
        ratio: The wanted time over the device's present one.
        power: Times go with the density to this power.
    """
    # The paper's gain of 1: ρ·(1 − (1 − T / t)), whose rounding is kept.
    return density if abs(1.0 - ratio) <= TIME_TOLERANCE else density * (1.0 - (1.0 - ratio ** (1.0 / power)))
