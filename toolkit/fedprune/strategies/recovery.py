"""Growth of submodels by early stopping (PR-FL, arXiv 2403.15439).

If a score has not become better in P checks, the submodel of a device, or of all devices, is too small to learn more.
Scores come from validation samples of the devices, never from test samples: the choice of a density would otherwise
have seen the test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprune.core.metrics import credible_metrics, primary_metric
from fedprune.core.settings import bounded, check_fields
from fedprune.jobs.state import JobDevice, State
from fedprune.strategies.allocation import GRANTED

# Entry of `Device.allocation`: the device's last score.
SCORE = "score"

# Entry of `State.allocation`: ρ_min, which only rises.
FLOOR = "floor"

# Entry of both: the best score, the last one, and the checks without a better one.
_WATCH = "watch"

# Entry of `State.allocation`: whether the whole model has stopped getting better, so that training is done.
DONE = "done"


@dataclass(frozen=True)
class Recovery:
    """Makes submodels grow whose scores have stopped getting better.

    Every check compares each device's own score and the mean score with their best so far. A device whose score has not
    become better in P checks grows: ρ_i ← ρ_i + Δρ. If the mean score has not become better, the floor (the least
    density of all devices) grows. When all devices have the whole model, and the mean score does not become better in
    8·P checks, training is done.

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
        # Rounded, so that 0.1 + 0.2 is 0.3 and not a density of its own.
        return min(1.0, round(density + self.delta, 9))

    def learn(self, device: JobDevice, metrics: Mapping[str, float]) -> None:
        """Keep the score of an update, if it brought one."""
        new_score = score_of_metrics(metrics, "_validation")
        if new_score is not None:
            device.allocation = {**device.allocation, SCORE: new_score}

    def review(self, state: State, min_density: float) -> dict[str, float]:
        """Check all scores, replace `allocation` of the state and its devices, and return the devices that grow with
        their new densities. `min_density` is ρ_min, the floor before it has grown."""
        members = {n: d for n, d in sorted(state.devices.items()) if d.widths and not d.excluded}
        if not members:
            return {}
        new_densities: dict[str, float] = {}
        for name, device in members.items():
            watch, fired = watch_score(device.allocation.get(_WATCH, {}), device.allocation.get(SCORE), self.patience)
            device.allocation = {**device.allocation, _WATCH: watch}
            if fired and _wanted_density(device) < 1:
                new_densities[name] = self.next_density(_wanted_density(device))
        floor = self._review_fleet(state, members, min_density)
        for name, device in members.items():
            # A device that grows above the floor by its own score keeps that density.
            if max(_wanted_density(device), new_densities.get(name, 0.0)) < floor:
                new_densities[name] = floor
        return new_densities

    def _review_fleet(self, state: State, members: Mapping[str, JobDevice], min_density: float) -> float:
        """Check the mean score, and return the floor. It rises from the sparsest device's density: otherwise no
        device's density would follow."""
        allocation = dict(state.allocation)
        floor = max(float(allocation.get(FLOOR, 0.0)), min_density)
        sparsest = max(floor, min(map(_wanted_density, members.values())))
        # The code has 8·P, 5·P and 2·P by how ρ_min came to be 1; one patience, the longest, serves all
        # (docs/strategies/pr-fl.md).
        patience = self.patience if sparsest < 1 else 8 * self.patience
        watch, fired = watch_score(allocation.get(_WATCH, {}), _mean_score(members), patience)
        if fired and sparsest >= 1:
            allocation[DONE] = True
        elif fired:
            floor = self.next_density(sparsest)
        state.allocation = {**allocation, FLOOR: floor, _WATCH: watch}
        return floor


def _wanted_density(device: JobDevice) -> float:
    """The density that a device was to get. Its plan may allow less, for good: the others grow and end without it."""
    return float(device.allocation.get(GRANTED, device.density))


def watch_score(old_state: Mapping[str, Any], new_score: float | None, patience: int) -> tuple[dict[str, Any], bool]:
    """One check for early stopping: the state to pass to the next check, as JSON, and whether it fires.

    `old_state` is that of the last check, empty at first; more of `new_score` is better, None without a score. After
    `patience` checks without a better score it fires, and starts to count again.
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
    """The leading metric, negated if less of it is better: more of a score is always better. None without a metric."""
    leading_metric = primary_metric(credible_metrics(metrics), suffix)
    if leading_metric is None:
        return None
    metric, value = leading_metric
    return value if metric.higher_is_better else -value


def _mean_score(members: Mapping[str, JobDevice]) -> float | None:
    """The mean of the middle scores, by samples: no single board's score or number of samples can move it far."""
    scores = sorted((d.allocation[SCORE], max(1, d.samples)) for d in members.values() if SCORE in d.allocation)
    if not scores:
        return None
    # With three devices one is left out at each end, with two none: the mean must keep at least one.
    trimmed_count = (len(scores) + 1) // 4
    middle = scores[trimmed_count : len(scores) - trimmed_count]
    return math.fsum(s * n for s, n in middle) / sum(n for _, n in middle)
