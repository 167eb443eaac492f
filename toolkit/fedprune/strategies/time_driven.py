"""Gives each device the share of the model with which all rounds take equally long (PR-FL, arXiv 2403.15439)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.core.settings import bounded, check_fields
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.strategies.allocation import GRANTED, TIMES, Allocator, Fixed, Fleet, Tiers
from fedprune.strategies.recovery import DONE, FLOOR, Recovery

# Entry of `State.allocation`: whether a density has grown, so that times no longer change densities.
_FROZEN = "frozen"

# Times that differ by less than this share are equal.
TIME_TOLERANCE = 0.05

# Gives devices their first densities.
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
        start: Gives devices their first densities.
        recovery: When and how densities grow; None for never.
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
        # A device that announces itself again has its earned density, not the start's: links break often.
        granted_density = fleet.state.devices[name].allocation.get(GRANTED)
        if granted_density is None:
            granted_density = self.start.density_of(fleet, name)
        self._grant(fleet, name, max(float(granted_density), self._density_floor(fleet)))

    def open(self, fleet: Fleet) -> bool:
        """Deal densities anew before the first round, since devices may have come; later nothing changes here."""
        if fleet.state.round > 1:
            return False
        floor, devices = self._density_floor(fleet), fleet.state.devices
        changed = [self._grant(fleet, n, max(self.start.density_of(fleet, n), floor)) for n in devices]
        return any(changed)

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
            # All grow from the least density, once one has grown; before that, balancing may still lower any to ρ_min.
            has_grown = bool(state.allocation.get(_FROZEN))
            densities = (d.density for d in state.devices.values() if has_grown and d.widths and not d.excluded)
            least = max(self.floor, min(densities, default=0.0))
            for name, density in self.recovery.review(state, least).items():
                grown |= self._grant(fleet, name, density)
        if grown and not state.allocation.get(_FROZEN):
            # From the first growth on, balancing rests: it would take away what early stopping gives.
            state.allocation = {**state.allocation, _FROZEN: True}
        return grown if state.allocation.get(_FROZEN) else self._balance(fleet) or grown

    def done(self, fleet: Fleet) -> bool:
        """Whether the whole model has learnt what it can."""
        return self.recovery is not None and bool(fleet.state.allocation.get(DONE))

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

    def _density_floor(self, fleet: Fleet) -> float:
        """The floor of all densities. A density that has grown needs none: from then on none falls."""
        return max(self.floor, float(fleet.state.allocation.get(FLOOR, 0.0)))

    def _grant(self, fleet: Fleet, name: str, density: float) -> bool:
        device = fleet.state.devices[name]
        if device.excluded:
            return False
        changed = fleet.grant(name, density, masks_elements=self.masks_elements)
        if device.allocation.get(GRANTED) != density:
            device.allocation = {**device.allocation, GRANTED: density}
        return changed


def balanced_density(density: float, ratio: float, power: float = 1.0) -> float:
    """The density at which a device would take `ratio` of its present time, which goes with the density to a power."""
    # The paper's gain of 1: ρ·(1 − (1 − T / t)), whose rounding is kept.
    return density if abs(1.0 - ratio) <= TIME_TOLERANCE else density * (1.0 - (1.0 - ratio ** (1.0 / power)))
