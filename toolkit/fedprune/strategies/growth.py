"""Allocators whose densities change with time: by how long rounds take, and by what is left to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.core.errors import ConfigError
from fedprune.jobs.state import Device, Task
from fedprune.strategies.allocation import TIMES, Allocator, Fixed, Fleet, Tiers, check_density
from fedprune.strategies.recovery import Recovery

Start = Fixed | Tiers
"""What growing allocators begin with."""


@dataclass(frozen=True)
class Ladder(Allocator):
    """Densities that grow when a model has learnt what it can (FedGMR's tiers, which climb).

    Attributes:
        start: What devices begin with.
        recovery: When and how they grow; None for never.
        interval: I: everything is judged every so many rounds.
    """

    start: Start = field(default_factory=Fixed)
    recovery: Recovery | None = field(default_factory=lambda: Recovery(step="ladder"))
    interval: int = 50

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError("allocator: interval", expected="1 or more rounds", got=self.interval)

    @property
    def elements(self) -> bool:
        return self.start.elements

    def admit(self, fleet: Fleet, name: str, known: Device | None) -> None:
        """What it had, at most grown meanwhile, or what devices begin with."""
        device = fleet.state.devices[name]
        granted = device.allocation.get("granted")
        if granted is None:
            self.start.admit(fleet, name, known)
            self._grant(fleet, name, max(device.density, self._least(fleet, name)))
        else:
            self._grant(fleet, name, max(float(granted), self._least(fleet, name)))

    def open(self, fleet: Fleet) -> bool:
        """In the first round the start deals out what it deals by names; later nothing changes here."""
        if fleet.state.round > 1 or not self.start.open(fleet):
            return False
        for name, device in fleet.state.devices.items():
            self._grant(fleet, name, max(device.density, self._least(fleet, name)))
        return True

    def learn(self, fleet: Fleet, name: str, task: Task, seconds: float | None) -> None:
        """Keep how well the device did on its validation samples."""
        if self.recovery is not None:
            self.recovery.learn(fleet.state.devices[name], task.metrics)

    def review(self, fleet: Fleet, metrics: Mapping[str, float]) -> bool:
        """Let those grow that have learnt what they can."""
        changed = False
        if fleet.state.round % self.interval or self.recovery is None:
            return changed
        for name, density in self.recovery.review(fleet.state, metrics, self._lowest(fleet)).items():
            changed |= self._grant(fleet, name, density)
        return changed

    def done(self, fleet: Fleet) -> bool:
        """Whether the whole model has learnt what it can."""
        return self.recovery is not None and self.recovery.stop and bool(fleet.state.allocation.get("done"))

    def _lowest(self, fleet: Fleet) -> float:
        """ρ_min: nobody has less, and from there all grow."""
        return min((d.density for d in fleet.state.devices.values() if d.widths and not d.excluded), default=0.0)

    def _least(self, fleet: Fleet, name: str) -> float:
        """The device's floor: what it was given to grow, and what all have."""
        return max(
            float(fleet.state.allocation.get("floor", 0.0)),
            float(fleet.state.devices[name].allocation.get("floor", 0.0)),
        )

    def _grant(self, fleet: Fleet, name: str, density: float) -> bool:
        device = fleet.state.devices[name]
        if device.excluded:
            return False
        changed = fleet.grant(name, density, elements=self.elements)
        if device.allocation.get("granted") != density:
            device.allocation = {**device.allocation, "granted": density}
        return changed


@dataclass(frozen=True)
class TimeDriven(Ladder):
    """Densities at which all devices take equally long (PR-FL, stage 1), then growing ones (stage 2).

    Every I rounds ρ_i ← clip(ρ_i·(1 − g·(1 − T / t_i)), ρ_min,i, 1), with t_i the mean of the last I times from offer
    to update at the present density, and T = min_j t_j / ρ_j: what the fastest would take for the whole model. With
    gain g = 1 that is the paper's min_j t_j / t_i, of times as they would be without pruning. Whoever is faster than T
    gets more of the model again, so that a density comes back when a slow link has recovered, and the fastest has all
    of it, however small they have all become. Equal times are the fixed point.

    Attributes:
        floor: ρ_min: no density goes below it.
        gain: g; the authors' code has 0.9.
        band: Times that are within this share of T are equal to it.
        power: Times go with ρ to this power, at most: 1 where elements are masked, 2 where channels are left out, whose
            work and weights are products of two widths. Then T = min_j t_j / ρ_j², and the root of T / t_i counts.
            Densities would else overshoot, and swing to and fro.
        freeze: Once a density has grown, times change none any more, as in the authors' code.
    """

    recovery: Recovery | None = field(default_factory=Recovery)
    floor: float = 0.1
    gain: float = 1.0
    band: float = 0.05
    freeze: bool = True
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density("allocator: floor", self.floor)
        for name in ("gain", "band"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"allocator: {name}", expected="from 0 to 1", got=getattr(self, name))
        if not 1 <= self.power <= 2:
            raise ConfigError("allocator: power", expected="from 1 to 2", got=self.power)

    def learn(self, fleet: Fleet, name: str, task: Task, seconds: float | None) -> None:
        """Keep the time, if it was taken at the present density, and the score."""
        super().learn(fleet, name, task, seconds)
        device = fleet.state.devices[name]
        if seconds is not None and seconds > 0 and (task.density, task.widths) == (device.density, device.widths):
            times = [*device.allocation.get(TIMES, []), seconds][-self.interval :]
            device.allocation = {**device.allocation, TIMES: times}

    def review(self, fleet: Fleet, metrics: Mapping[str, float]) -> bool:
        """Stage 2, then stage 1 unless that is over."""
        grown = super().review(fleet, metrics)
        if fleet.state.round % self.interval:
            return grown
        if grown and self.freeze and not fleet.state.allocation.get("frozen"):
            fleet.state.allocation = {**fleet.state.allocation, "frozen": True}
        return grown if fleet.state.allocation.get("frozen") else self._balance(fleet) or grown

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
            density = balanced(present[name], whole / seconds, self.gain, self.band, self.power)
            changed |= self._grant(fleet, name, min(1.0, max(density, self._least(fleet, name))))
        return changed

    def _lowest(self, fleet: Fleet) -> float:
        # Until something has grown, densities still come down to the floor, wherever they stand.
        return max(self.floor, super()._lowest(fleet)) if fleet.state.allocation.get("frozen") else self.floor

    def _least(self, fleet: Fleet, name: str) -> float:
        return max(self.floor, super()._least(fleet, name))


def balanced(density: float, ratio: float, gain: float = 1.0, band: float = 0.0, power: float = 1.0) -> float:
    """A density at which a device takes as long as wanted (PR-FL, stage 1).

    Args:
        density: The present one.
        ratio: The wanted time over the device's present one.
        gain: How much of the way is gone at once.
        band: A ratio this close to 1 is 1.
        power: Times go with the density to this power.
    """
    return density if abs(1.0 - ratio) <= band else density * (1.0 - gain * (1.0 - ratio ** (1.0 / power)))
