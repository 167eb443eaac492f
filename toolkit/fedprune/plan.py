"""How wide a board's model can be: the widest that fits its memory, its time and its link."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedprune.architecture import Architecture, widths_at
from fedprune.errors import PlanError
from fedprune.ladder import Rung, equal_work, rungs
from fedprune.latency import LatencyTable
from fedprune.prediction import (
    NO_CORRECTION,
    Correction,
    Prediction,
    bandwidth,
    latency_table,
    predict,
    training_memory,
)
from fedprune.probe_report import ProbeReport
from fedprune.profile import HardwareProfile
from fedprune.recipe import Recipe

DENSITIES: tuple[float, ...] = tuple(k / 64 for k in range(64, 3, -1))
"""Candidates, widest first: from the whole model down to a sixteenth of every group."""

NOTHING = "nothing"
"""What bounds a plan of full width."""

MEMORY = "memory"
TIME = "time"
LINK = "link"
BYTES = "bytes"
STORAGE = "storage"
LIMITS = (MEMORY, TIME, LINK, BYTES, STORAGE)


@dataclass(frozen=True)
class Limit:
    """One limit of a board or job, and what a submodel would use of it.

    Attributes:
        name: memory, time, link, bytes or storage.
        value: What the submodel needs.
        limit: What there is.
        unit: bytes or s.
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def fits(self) -> bool:
        """Whether the need is within the limit."""
        return self.value <= self.limit

    @property
    def headroom(self) -> float:
        """What is left, as a share of the limit; negative where it doesn't fit."""
        return (self.limit - self.value) / self.limit if self.limit > 0 else -math.inf

    @property
    def overshoot(self) -> float:
        """Need over limit."""
        return self.value / self.limit if self.limit > 0 else math.inf

    def describe(self) -> str:
        """One line for people."""
        share = f"{self.overshoot:.0%}" if math.isfinite(self.overshoot) else "over"
        return f"{self.name}: {_amount(self.value, self.unit)} of {_amount(self.limit, self.unit)} ({share})"


@dataclass(frozen=True)
class Uniform:
    """What uniform widths of as many multiplications as a plan's would take.

    Attributes:
        density: Their share of every group.
        step_s: Time of a training step.
        latency_s: Time of a prediction.
    """

    density: float
    step_s: float
    latency_s: float


@dataclass(frozen=True)
class Plan:
    """How wide a board's model is, and why.

    Attributes:
        widths: Kept channels per group.
        density: The kept share that they are near to.
        prediction: What a round is expected to cost.
        limits: Every limit that was looked at.
        bound: The limit that the next wider candidate breaks (by most, if several); "nothing" at full width.
        uniform: What uniform widths would take instead.
        correction: What the board's rounds taught; it is in all times.
    """

    widths: tuple[int, ...]
    density: float
    prediction: Prediction
    limits: tuple[Limit, ...]
    bound: str
    uniform: Uniform
    correction: Correction = NO_CORRECTION

    def limit(self, name: str) -> Limit:
        """The limit of that name.

        Raises:
            KeyError: This plan has no such limit.
        """
        return next(limit for limit in self.limits if limit.name == name)

    def describe(self, whole: int | None = None) -> str:
        """A few lines for people: width, costs, every limit, the binding one marked.

        Args:
            whole: Parameters of the whole model; with them it says which share of the weights is kept, which is less
                than the density: a layer loses inputs as well as outputs.
        """
        p = self.prediction
        kept = f"{p.parameters:,}"
        if whole:
            kept = f"keeps {p.parameters / whole:.0%} of the weights: {kept} of {whole:,}"
        lines = [
            f"density {self.density:.3g} ({kept} parameters, {p.forward_macs:,} multiplications per sample)",
            f"a round: {p.steps} steps of {_amount(p.step_s, 's')}, {_amount(p.transfer_s, 's')} on the link",
            f"a prediction: {_amount(p.latency_s, 's')}{self._energy()}",
        ]
        if self.correction != NO_CORRECTION:
            c = self.correction
            lines.append(f"learnt from its rounds: steps take {c.step:.2f}, predictions {c.latency:.2f} times as long")
        for limit in self.limits:
            mark = "  <- binds" if limit.name == self.bound else ""
            lines.append(f"  {limit.describe()}{mark}")
        if self.bound == NOTHING:
            # The whole model is always tried first, unless the density was not the planner's to choose.
            lines.append(
                "  nothing binds: the whole model fits"
                if self.density == 1
                else f"  nothing binds: density {self.density:.3g}, as asked"
            )
        return "\n".join(lines)

    def gains(self) -> str:
        """A line on what differs from uniform width by at least a hundredth; empty where nothing does."""
        p, u = self.prediction, self.uniform
        pairs = (("step", p.step_s, u.step_s), ("prediction", p.latency_s, u.latency_s))
        found = ", ".join(
            f"{name} {_amount(mine, 's')} instead of {_amount(its, 's')}"
            for name, mine, its in pairs
            if abs(its - mine) >= 0.01 * its
        )
        return found and f"gained over uniform width at as many multiplications: {found}"

    def _energy(self) -> str:
        p = self.prediction
        if p.step_j is None or p.latency_j is None:
            return ""
        return f"; {_amount(p.step_j, 'J')} per step, {_amount(p.latency_j, 'J')} per prediction"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "widths": list(self.widths), "limits": [asdict(m) for m in self.limits]}

    @classmethod
    def from_dict(cls, body: object) -> Plan:
        """Read and check what `to_dict` writes.

        Raises:
            PlanError: It is not what `to_dict` writes.
        """
        try:
            if not isinstance(body, Mapping):
                raise TypeError(f"a {type(body).__name__}")
            prediction = Prediction(
                **{f.name: _figure(body["prediction"][f.name], str(f.type)) for f in fields(Prediction)}
            )
            limits = tuple(
                Limit(
                    _choice(m["name"], LIMITS),
                    _number(m["value"]),
                    _number(m["limit"]),
                    _choice(m["unit"], ("bytes", "s")),
                )
                for m in body["limits"]
            )
            plan = cls(
                widths=tuple(_number(w, whole=True) for w in body["widths"]),
                density=_number(body["density"]),
                prediction=prediction,
                limits=limits,
                bound=_choice(body["bound"], (*LIMITS, NOTHING)),
                uniform=Uniform(**{f.name: _number(body["uniform"][f.name]) for f in fields(Uniform)}),
                correction=Correction(**{f.name: _number(body["correction"][f.name]) for f in fields(Correction)}),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"this is not a plan ({type(error).__name__}: {error})") from error
        if not 0 < plan.density <= 1 or any(w < 1 for w in plan.widths):
            raise PlanError("plan: density or widths are out of range", got=(plan.density, plan.widths))
        return plan


def plan(
    architecture: Architecture,
    profile: HardwareProfile,
    recipe: Recipe | Callable[[tuple[int, ...]], Recipe],
    samples: int,
    *,
    byte_budget: int | None = None,
    deadline_s: float | None = None,
    probe: ProbeReport | None = None,
    densities: Sequence[float] = DENSITIES,
    correction: Correction = NO_CORRECTION,
) -> Plan:
    """The widest submodel of `architecture` that a board can train.

    Where the planner is free to choose (`DENSITIES`), widths are those that are cheap on the board
    (`fedprune.ladder`); densities that somebody asks for are kept to in every group.

    Args:
        architecture: The model.
        profile: What the board is.
        recipe: The local training of a round; or what makes it of a submodel's widths, where it depends on those.
        samples: The board's training samples.
        byte_budget: Bytes per round, down plus up, that the job allows.
        deadline_s: Seconds that a round may take on the board, transfers included.
        probe: What the board measured of itself; it beats the profile.
        densities: Candidate shares of every group.
        correction: What its earlier rounds taught about its times.

    Raises:
        PlanError: Not even the narrowest candidate fits; or there is no candidate, or a limit isn't positive.
    """
    for name, value in (("samples", samples), ("byte_budget", byte_budget), ("deadline_s", deadline_s)):
        if value is not None and (not math.isfinite(value) or value <= 0):
            raise PlanError(name, expected="a number above 0", got=value)
    wider: tuple[Limit, ...] = ()
    limits: tuple[Limit, ...] = ()

    def foretold(widths: tuple[int, ...]) -> Prediction:
        asked = recipe if isinstance(recipe, Recipe) else recipe(widths)
        return predict(architecture, widths, profile, asked, samples, probe=probe, correction=correction)

    whole = recipe if isinstance(recipe, Recipe) else recipe(architecture.sizes)
    table, batch, memory = latency_table(profile, probe), min(whole.batch_size, samples), bandwidth(profile, probe)
    for rung in _candidates(architecture, table, batch, densities, memory):
        prediction = foretold(rung.widths)
        limits = _limits(prediction, profile, probe, byte_budget, deadline_s)
        if all(limit.fits for limit in limits):
            other = equal_work(architecture, table, batch, rung.widths, memory)
            seen = foretold(other.widths)
            return Plan(
                rung.widths,
                rung.density,
                prediction,
                limits,
                _worst(wider).name if wider else NOTHING,
                Uniform(other.density, seen.step_s, seen.latency_s),
                correction,
            )
        wider = limits
    if not limits:
        raise PlanError("there is no density to choose from")
    worst = _worst(limits)
    others = [m.describe() for m in limits if not m.fits and m is not worst]
    raise PlanError(
        f"no width of {architecture.name} fits {profile.name}: even the narrowest breaks {worst.name}"
        if len(set(densities)) > 1
        else f"{architecture.name} at density {max(densities):.3g} doesn't fit {profile.name}: it breaks {worst.name}",
        expected=f"at most {_amount(worst.limit, worst.unit)}",
        got=f"{_amount(worst.value, worst.unit)}, {_amount(worst.value - worst.limit, worst.unit)} too much",
        hint=(f"It also breaks {'; '.join(others)}. " if others else "") + _HINTS[worst.name],
    )


def _candidates(
    architecture: Architecture, table: LatencyTable, batch: int, densities: Sequence[float], memory: float
) -> Sequence[Rung]:
    if tuple(densities) == DENSITIES:
        return rungs(architecture, table, batch, densities, memory)
    found: dict[tuple[int, ...], Rung] = {}
    for density in sorted(set(densities), reverse=True):
        widths = widths_at(architecture, density)
        found.setdefault(widths, Rung(density, widths, 1))
    return list(found.values())


_HINTS = {
    MEMORY: "Use a smaller batch or fewer local samples, or a smaller model.",
    TIME: "Allow more time, or fewer epochs or steps.",
    LINK: "Raise link.bytes_per_round of the profile, or use a smaller model.",
    BYTES: "Raise the job's byte budget, or use a smaller model.",
    STORAGE: "Raise storage.budget_bytes of the profile.",
}


def _limits(
    prediction: Prediction,
    profile: HardwareProfile,
    probe: ProbeReport | None,
    byte_budget: int | None,
    deadline_s: float | None,
) -> tuple[Limit, ...]:
    limits = [
        Limit(MEMORY, prediction.memory_bytes, training_memory(profile, probe), "bytes"),
        Limit(LINK, prediction.round_bytes, profile.link.bytes_per_round, "bytes"),
        Limit(STORAGE, prediction.storage_bytes, profile.storage.budget_bytes, "bytes"),
    ]
    if deadline_s is not None:
        limits.append(Limit(TIME, prediction.round_s, deadline_s, "s"))
    if byte_budget is not None:
        limits.append(Limit(BYTES, prediction.round_bytes, byte_budget, "bytes"))
    return tuple(sorted(limits, key=lambda limit: LIMITS.index(limit.name)))


def _worst(limits: Sequence[Limit]) -> Limit:
    return max((m for m in limits if not m.fits), key=lambda m: m.overshoot)


def _amount(value: float, unit: str) -> str:
    if unit == "J":
        return f"{value:,.1f} J" if abs(value) >= 1 or value == 0 else f"{value * 1000:.3g} mJ"
    if unit == "bytes":
        return f"{value / 1e6:,.2f} MB" if abs(value) >= 1e5 else f"{value:,.0f} bytes"
    if abs(value) >= 1 or value == 0:
        return f"{value:,.1f} s"
    return f"{value * 1000:.3g} ms"


def _number(value: Any, *, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a {'whole ' if whole else ''}number")
    return value


def _figure(value: Any, kind: str) -> Any:
    """A figure of a prediction; those that a profile may lack are numbers or null."""
    return None if value is None and "None" in kind else _number(value, whole=kind == "int")


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    return str(value)
