"""Densities that change with time: by how long rounds take, and by what is left to learn (PR-FL, arXiv 2403.15439).

A score that has not become better in P checks says that a device's submodel, or the whole model, is too small to learn
more. Scores come from devices' validation samples, never from test samples: what they decide would otherwise have seen
the test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.core.metrics import believable, leading
from fedprune.core.settings import bounded, check_fields
from fedprune.jobs.state import Device, State, Task
from fedprune.strategies.allocation import TIMES, Allocator, Fixed, Fleet, Tiers

SCORE = "score"
"""Entry of `Device.allocation`: the device's last score."""

FLOOR = "floor"
"""Entry of `State.allocation`: ρ_min, which only rises."""

_WATCH, _GRANTED, _FROZEN, _DONE = "watch", "granted", "frozen", "done"
"""Further entries: what early stopping remembers, a device's density, whether stage 1 is over, and all training."""

BAND = 0.05
"""Times that are within this share of the wanted one are equal to it."""


@dataclass(frozen=True)
class Recovery:
    """Growth by early stopping.

    At every check each device's own score and the mean score are looked at. A device's that has not become better in P
    checks lets the device grow: ρ_i ← ρ_i + Δρ. The mean score lets the floor of all grow.
    When all have all of the model, and the mean score does not become better in 8·P checks, training is done.

    The mean is over devices' validation samples, each device by its samples, without the quarter with the lowest and
    the quarter with the highest scores (one of three devices, none of two), so that no board's word alone decides when
    all grow. A score that is the same as at the last check is none: too little was learnt to say.

    Attributes:
        patience: P, in checks.
        delta: Δρ.
    """

    patience: int = bounded(10, 1, 10**6)
    delta: float = bounded(0.2, 0, 1, above=True)

    def __post_init__(self) -> None:
        check_fields(self, ("recovery",))

    def grown(self, density: float) -> float:
        """The next density, 1 at most."""
        return min(1.0, round(density + self.delta, 9))

    def learn(self, device: Device, metrics: Mapping[str, float]) -> None:
        """Keep the score of an update, if it brought one."""
        found = score(metrics, "_validation")
        if found is not None:
            device.allocation = {**device.allocation, SCORE: found}

    def review(self, state: State, least: float) -> dict[str, float]:
        """A check: look at all scores.

        Args:
            state: Its devices' and its own `allocation` are replaced.
            least: ρ_min, as far as nothing has made it grow.

        Returns:
            Devices that grow, with their new densities.
        """
        part = {n: d for n, d in sorted(state.devices.items()) if d.widths and not d.excluded}
        if not part:
            return {}
        grows: dict[str, float] = {}
        for name, device in part.items():
            seen, fired = watch(device.allocation.get(_WATCH, {}), device.allocation.get(SCORE), self.patience)
            device.allocation = {**device.allocation, _WATCH: seen}
            if fired and device.density < 1:
                grows[name] = self.grown(device.density)
        lifted = self._review_whole(state, part, least)
        for name, device in part.items():
            if max(device.density, grows.get(name, 0.0)) < lifted:
                grows[name] = lifted
        return grows

    def _review_whole(self, state: State, part: Mapping[str, Device], least: float) -> float:
        """Look at the mean score, and return the floor.

        It rises from the sparsest device's density: otherwise no device's density would follow.
        """
        own = dict(state.allocation)
        floor = max(float(own.get(FLOOR, 0.0)), least)
        standing = max(floor, min(d.density for d in part.values()))
        patience = self.patience if standing < 1 else 8 * self.patience
        seen, fired = watch(own.get(_WATCH, {}), _mean_score(part), patience)
        if fired and standing >= 1:
            own[_DONE] = True
        elif fired:
            floor = self.grown(standing)
        state.allocation = {**own, FLOOR: floor, _WATCH: seen}
        return floor


def watch(seen: Mapping[str, Any], found: float | None, patience: int) -> tuple[dict[str, Any], bool]:
    """Early stopping, one check.

    Args:
        seen: What the last check returned; empty at first.
        found: The score, more is better; None without one.
        patience: After this many checks without a better score it fires, and starts to count again.

    Returns:
        What to remember, as JSON, and whether it fires.
    """
    best, last, count = seen.get("best"), seen.get("last"), int(seen.get("count", 0))
    fired = False
    if found is not None and found != last:
        last = found
        if best is None or found > best:
            best, count = found, 0
        else:
            count += 1
            fired = count >= patience
            count = 0 if fired else count
    return {"best": best, "last": last, "count": count}, fired


def score(metrics: Mapping[str, float], suffix: str = "") -> float | None:
    """A score, more is better: what the model is judged by, with its sign turned where less is better; None without."""
    found = leading(believable(metrics), suffix)
    return None if found is None else found[1] if found[0].higher else -found[1]


def _mean_score(part: Mapping[str, Device]) -> float | None:
    """The mean of the middle scores: a board's word, and what it says of its samples, can't move it far."""
    known = sorted((d.allocation[SCORE], max(1, d.samples)) for d in part.values() if SCORE in d.allocation)
    if not known:
        return None
    outer = (len(known) + 1) // 4
    middle = known[outer : len(known) - outer]
    return math.fsum(s * n for s, n in middle) / sum(n for _, n in middle)


Start = Fixed | Tiers
"""What devices begin with."""


@dataclass(frozen=True)
class TimeDriven(Allocator):
    """Densities at which all devices take equally long (PR-FL, stage 1), then growing ones (stage 2).

    Every I rounds ρ_i ← clip(ρ_i·T / t_i, ρ_min, 1), with t_i the mean of the last I times from offer to update at
    the present density, and T = min_j t_j / ρ_j: what the fastest would take for the whole model. That is the paper's
    min_j t_j / t_i, of times as they would be without pruning. Whoever is faster than T gets more of the model again,
    so that a density comes back when a slow link has recovered, and the fastest has all of it, however small they have
    all become. Equal times are the fixed point. Once a density has grown, times change none any more.

    Attributes:
        start: What devices begin with.
        recovery: When and how they grow; None for never.
        interval: I: rounds between checks.
        floor: ρ_min: no density goes below it.
        power: Times go with ρ to this power, at most: 1 where elements are masked, 2 where channels are left out, whose
            work and weights are products of two widths. Then T = min_j t_j / ρ_j², and the root of T / t_i counts.
            Densities would else overshoot, and swing to and fro.
    """

    start: Start = field(default_factory=Fixed)
    recovery: Recovery | None = field(default_factory=Recovery)
    interval: int = bounded(50, 1, 10**6)
    floor: float = bounded(0.1, 0, 1, above=True)
    power: float = bounded(1.0, 1, 2)

    def __post_init__(self) -> None:
        check_fields(self, ("allocator",))

    @property
    def elements(self) -> bool:
        return self.start.elements

    def admit(self, fleet: Fleet, name: str, known: Device | None) -> None:
        """Grant the density that the device had, or its initial one, and no less than the current minimum."""
        device = fleet.state.devices[name]
        granted = device.allocation.get(_GRANTED)
        if granted is None:
            self.start.admit(fleet, name, known)
            granted = device.density
        self._grant(fleet, name, max(float(granted), self._least(fleet)))

    def open(self, fleet: Fleet) -> bool:
        """In the first round the start deals out what it deals by names; later nothing changes here."""
        if fleet.state.round > 1 or not self.start.open(fleet):
            return False
        for name, device in fleet.state.devices.items():
            self._grant(fleet, name, max(device.density, self._least(fleet)))
        return True

    def learn(self, fleet: Fleet, name: str, task: Task, seconds: float | None) -> None:
        """Keep how well the device did on its validation samples; and the time, if it was taken at the present
        density."""
        device = fleet.state.devices[name]
        if self.recovery is not None:
            self.recovery.learn(device, task.metrics)
        if seconds is not None and seconds > 0 and (task.density, task.widths) == (device.density, device.widths):
            times = [*device.allocation.get(TIMES, []), seconds][-self.interval :]
            device.allocation = {**device.allocation, TIMES: times}

    def review(self, fleet: Fleet, metrics: Mapping[str, float]) -> bool:
        """Stage 2, then stage 1 unless that is over."""
        state, grown = fleet.state, False
        if state.round % self.interval:
            return False
        if self.recovery is not None:
            for name, density in self.recovery.review(state, self._lowest(fleet)).items():
                grown |= self._grant(fleet, name, density)
        if grown and not state.allocation.get(_FROZEN):
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
        present = {name: fleet.state.devices[name].density for name in means}
        whole, changed = min(seconds / present[name] ** self.power for name, seconds in means.items()), False
        for name, seconds in means.items():
            density = balanced(present[name], whole / seconds, self.power)
            changed |= self._grant(fleet, name, min(1.0, max(density, self._least(fleet))))
        return changed

    def _lowest(self, fleet: Fleet) -> float:
        """ρ_min: the least density, from which all devices grow. Until something has grown, densities still come down
        to the floor, wherever they stand."""
        if not fleet.state.allocation.get(_FROZEN):
            return self.floor
        held = (d.density for d in fleet.state.devices.values() if d.widths and not d.excluded)
        return max(self.floor, min(held, default=0.0))

    def _least(self, fleet: Fleet) -> float:
        """The floor of all. What a device was given to grow needs none: once one has grown, no density falls."""
        return max(self.floor, float(fleet.state.allocation.get(FLOOR, 0.0)))

    def _grant(self, fleet: Fleet, name: str, density: float) -> bool:
        device = fleet.state.devices[name]
        if device.excluded:
            return False
        changed = fleet.grant(name, density, elements=self.elements)
        if device.allocation.get(_GRANTED) != density:
            device.allocation = {**device.allocation, _GRANTED: density}
        return changed


def balanced(density: float, ratio: float, power: float = 1.0) -> float:
    """A density at which a device takes as long as wanted (PR-FL, stage 1).

    Args:
        density: The present one.
        ratio: The wanted time over the device's present one.
        power: Times go with the density to this power.
    """
    # The paper's gain of 1: ρ·(1 − (1 − T / t)), whose rounding is kept.
    return density if abs(1.0 - ratio) <= BAND else density * (1.0 - (1.0 - ratio ** (1.0 / power)))
