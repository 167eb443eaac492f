"""When a pruned model has learnt what it can, and by how much it grows then (PR-FL, stage 2; FedGMR).

A score that has not become better in P checks says that a device's submodel, or the whole model, is too small to learn
more. Scores come from validation samples, the devices' or the server's, never from test samples: what they decide would
otherwise have seen the test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedprune.core.errors import ConfigError, shown
from fedprune.core.metrics import believable
from fedprune.jobs.state import Device, State

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
        stable: So many checks whoever has just grown is not looked at (FedGMR: 2·P).
        final_patience: P of the whole model when all have all of it; 0 for 8·P.
        validation: Where the whole model's score comes from: `devices`, the mean over their validation samples, each
            device by its samples, without the quarter with the lowest and the quarter with the highest scores (one of
            three devices, none of two), so that no board's word alone decides when all grow; `server`, its evaluation
            set, which is then no test set any more.
        stop: Whether the job ends when training is done.
    """

    patience: int = 10
    step: Step = "add"
    delta: float = 0.2
    rungs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    reset: bool = False
    stable: int = 0
    final_patience: int = 0
    validation: Validation = "devices"
    stop: bool = True

    def __post_init__(self) -> None:
        for name, low in (("patience", 1), ("stable", 0), ("final_patience", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"recovery: {name}", expected=f"{low} or more checks", got=getattr(self, name))
        if self.step not in get_args(Step):
            raise ConfigError("recovery: step", expected=" or ".join(get_args(Step)), got=shown(self.step))
        if self.validation not in get_args(Validation):
            raise ConfigError(
                "recovery: validation", expected=" or ".join(get_args(Validation)), got=shown(self.validation)
            )
        if not 0 < self.delta <= 1:
            raise ConfigError("recovery: delta", expected="above 0 and at most 1", got=self.delta)
        if list(self.rungs) != sorted({*self.rungs, 1.0}) or self.rungs[0] <= 0:
            raise ConfigError("recovery: rungs", expected="rising densities up to 1", got=shown(self.rungs))

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

        It rises from where the sparsest device stands: growth that nobody's density follows would be none.
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
        found: The score, more is better; None where there is none.
        patience: After so many checks without a better score it fires, and begins to count anew.

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
    """A score, more is better: the accuracy, or where numbers are predicted minus the loss; None without either."""
    found = believable(metrics)
    for name, sign in ((f"accuracy{suffix}", 1.0), (f"loss{suffix}", -1.0)):
        if name in found:
            return sign * found[name]
    return None


def _mean_score(part: Mapping[str, Device]) -> float | None:
    """The mean of the middle scores: a board's word, and what it says of its samples, can't move it far."""
    known = sorted((d.allocation[SCORE], max(1, d.samples)) for d in part.values() if SCORE in d.allocation)
    if not known:
        return None
    outer = (len(known) + 1) // 4
    middle = known[outer : len(known) - outer]
    return math.fsum(s * n for s, n in middle) / sum(n for _, n in middle)
