"""Allocators whose densities change with time: by how long rounds take, and by what is left to learn (PR-FL, FedGMR).

A score that has not become better in P checks says that a device's submodel, or the whole model, is too small to learn
more. Scores come from validation samples, the devices' or the server's, never from test samples: what they decide would
otherwise have seen the test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedprune.core.errors import ConfigError, shown
from fedprune.core.metrics import believable, leading
from fedprune.core.settings import bounded, check_fields
from fedprune.jobs.state import Device, State, Task
from fedprune.strategies.allocation import TIMES, Allocator, Fixed, Fleet, Tiers

Step = Literal["add", "double", "ladder"]
Validation = Literal["devices", "server"]

SCORE = "score"
"""Entry of `Device.allocation`: the device's last score."""

FLOOR = "floor"
"""Entry of `Device.allocation` and `State.allocation`: ρ_min,i and ρ_min, which only rise."""

_WATCH = "watch"
_LAST_RUNG = 0.7
"""FedGMR's doubling goes to the whole model when so much of a step would reach it."""


@dataclass(frozen=True)
class Recovery:
    """Growth by early stopping.

    At every check each device's own score and the whole model's are looked at. A device's that has not become better in
    P checks lets the device grow: ρ_min,i ← ρ_i + Δρ, ρ_i ← max(ρ_i, ρ_min,i). The whole model's lets the floor of all
    grow. When all have all of the model, and it does not become better in `final_patience` checks, training is done.

    Attributes:
        patience: P, in checks. A score that is the same as at the last check is none: too little was learnt to say.
        step: `add`: by Δρ (PR-FL). `double`: to twice the density, by Δρ at most (FedGMR). `ladder`: to the next rung.
        delta: Δρ.
        rungs: Densities of the ladder.
        reset: Whoever grows begins with a new best score (FedGMR), instead of having to beat the smaller model's.
        stable: Checks for which a device that has just grown is skipped (FedGMR: 2·P).
        final_patience: P of the whole model when all have all of it; 0 for 8·P.
        validation: Where the whole model's score comes from: `devices`, the mean over their validation samples, each
            device by its samples, without the quarter with the lowest and the quarter with the highest scores (one of
            three devices, none of two), so that no board's word alone decides when all grow; `server`, its evaluation
            set, which is then no test set any more.
        stop: Whether the job ends when training is done.
    """

    patience: int = bounded(10, 1, 10**6)
    step: Step = "add"
    delta: float = bounded(0.2, 0, 1, above=True)
    rungs: tuple[float, ...] = bounded((0.05, 0.1, 0.2, 0.5, 1.0), 0, 1, above=True)
    reset: bool = False
    stable: int = bounded(0, 0, 10**6)
    final_patience: int = bounded(0, 0, 10**6)
    validation: Validation = "devices"
    stop: bool = True

    def __post_init__(self) -> None:
        check_fields(self, ("recovery",))
        if list(self.rungs) != sorted({*self.rungs, 1.0}):
            raise ConfigError(("recovery", "rungs"), expected="rising densities up to 1", got=shown(self.rungs))

    def grown(self, density: float) -> float:
        """The next density, 1 at most."""
        if self.step == "ladder":
            return next((r for r in self.rungs if r > density + 1e-9), 1.0)
        if self.step == "add":
            return min(1.0, round(density + self.delta, 9))
        if density + min(_LAST_RUNG * density, self.delta) >= 1:
            return 1.0
        return min(1.0, round(density + min(density, self.delta), 9))

    def learn(self, device: Device, metrics: Mapping[str, float]) -> None:
        """Keep the score of an update, if it brought one."""
        found = score(metrics, "_validation")
        if found is not None:
            device.allocation = {**device.allocation, SCORE: found}

    def review(self, state: State, metrics: Mapping[str, float], least: float) -> dict[str, float]:
        """A check: look at all scores.

        Args:
            state: Its devices' and its own `allocation` are replaced.
            metrics: What the server measured of the new model.
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
            if fired and device.density < 1:
                grows[name] = self.grown(device.density)
                seen = self._restarted(seen)
                device.allocation = {**device.allocation, FLOOR: grows[name]}
            device.allocation = {**device.allocation, _WATCH: seen}
        lifted = self._review_whole(state, part, metrics, least, bool(grows))
        for name, device in part.items():
            if max(device.density, grows.get(name, 0.0)) < lifted:
                grows[name] = lifted
        return grows

    def _review_whole(
        self, state: State, part: Mapping[str, Device], metrics: Mapping[str, float], least: float, growing: bool
    ) -> float:
        """Look at the whole model's score, and return the floor.

        It rises from the sparsest device's density: otherwise no device's density would follow.
        """
        own = dict(state.allocation)
        floor = max(float(own.get(FLOOR, 0.0)), least)
        standing = max(floor, min(d.density for d in part.values()))
        found = score(metrics) if self.validation == "server" else _mean_score(part)
        patience = self.patience if standing < 1 else self.final_patience or 8 * self.patience
        seen, fired = watch(own.get(_WATCH, {}), found, patience)
        if fired and standing >= 1:
            own["done"] = True
        elif fired:
            floor = self.grown(standing)
            seen = self._restarted(seen)
        elif growing and self.reset:
            seen = {**seen, "best": None, "count": 0}
        state.allocation = {**own, FLOOR: floor, _WATCH: seen}
        return floor

    def _restarted(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        return {**seen, "rest": self.stable, **({"best": None} if self.reset else {})}


def watch(seen: Mapping[str, Any], found: float | None, patience: int) -> tuple[dict[str, Any], bool]:
    """Early stopping, one check.

    Args:
        seen: What the last check returned; empty at first.
        found: The score, more is better; None without one.
        patience: After this many checks without a better score it fires, and starts to count again.

    Returns:
        What to remember, as JSON, and whether it fires.
    """
    best, last = seen.get("best"), seen.get("last")
    count, rest = int(seen.get("count", 0)), int(seen.get("rest", 0))
    fired = False
    if rest > 0:
        rest -= 1
    elif found is not None and found != last:
        last = found
        if best is None or found > best:
            best, count = found, 0
        else:
            count += 1
            fired = count >= patience
            count = 0 if fired else count
    return {"best": best, "last": last, "count": count, "rest": rest}, fired


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
"""The initial state of growing allocators."""


@dataclass(frozen=True)
class Ladder(Allocator):
    """Densities that grow when a model has learnt what it can (FedGMR's tiers, which climb).

    Attributes:
        start: What devices begin with.
        recovery: When and how they grow; None for never.
        interval: I: rounds between checks.
    """

    start: Start = field(default_factory=Fixed)
    recovery: Recovery | None = field(default_factory=lambda: Recovery(step="ladder"))
    interval: int = bounded(50, 1, 10**6)

    def __post_init__(self) -> None:
        check_fields(self, ("allocator",))

    @property
    def elements(self) -> bool:
        return self.start.elements

    def admit(self, fleet: Fleet, name: str, known: Device | None) -> None:
        """Grant the density that the device had, or its initial one, and no less than the current minimum."""
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
        """ρ_min: the least density, from which all devices grow."""
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
    floor: float = bounded(0.1, 0, 1, above=True)
    gain: float = bounded(1.0, 0, 1)
    band: float = bounded(0.05, 0, 1)
    freeze: bool = True
    power: float = bounded(1.0, 1, 2)

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
