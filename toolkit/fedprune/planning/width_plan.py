"""How wide a board's model is, and why: the limits, what the model uses of them, and which limit binds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fedprune.core.errors import PlanError
from fedprune.core.records import convert_record
from fedprune.core.text import amount
from fedprune.planning.correction import NO_CORRECTION, Correction
from fedprune.planning.costs import MemoryBreakdown
from fedprune.planning.prediction import Prediction

# Stands for the binding limit of a plan that nothing limits.
NOTHING_BINDS = "nothing"

MEMORY = "memory"
TIME = "time"
LINK = "link"
BYTES = "bytes"
ENERGY = "energy"
STORAGE = "storage"
# How many times a round's predicted time its deadline must leave, since times vary from round to round: about the error
# of a step once a round has corrected it (docs/planner.md#how-far-predictions-are-off).
TIME_MARGIN = 1.05

LIMIT_NAMES = (MEMORY, TIME, LINK, BYTES, ENERGY, STORAGE)


@dataclass(frozen=True)
class PlanLimit:
    """One limit of a board or job: what a submodel uses (`value`), and what it may use (`limit`), in `bytes`, `s` or
    `J`."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def fits(self) -> bool:
        return self.value <= self.limit

    @property
    def used_share(self) -> float:
        return self.value / self.limit if self.limit > 0 else math.inf

    def describe(self) -> str:
        share = f"{self.used_share:.0%}" if math.isfinite(self.used_share) else "over"
        return f"{self.name}: {amount(self.value, self.unit)} of {amount(self.limit, self.unit)} ({share})"


@dataclass(frozen=True)
class AskedShare:
    """A share of the model that a strategy or a job asks for, where the planner isn't free to choose.

    Attributes:
        density: Of every channel group, or of the elements that a mask keeps.
        widths: Its channels per group.
        masks_elements: Whether it is a mask of elements over all channels.
        whole: Whether the method needs it as it is: a board that can't hold it takes no part.
    """

    density: float
    widths: tuple[int, ...]
    masks_elements: bool = False
    whole: bool = False


@dataclass(frozen=True)
class WidthPlan:
    """How wide a board's model is, and why.

    Attributes:
        density: The kept share that the widths are near to.
        limits: Every limit that was looked at.
        bound: The limit that the next wider candidate breaks (by most, if several); "nothing" at full width.
        accumulate: Parts in which a batch is worked through; at least the recipe's own `accumulate`.
        notes: What was chosen besides the widths, and why, for people.
        warning: That little of the model is left, and which settings would keep all of it; that even the narrowest
            takes too much memory; or that energy can't be limited. Empty without a warning.
        correction: What the board's rounds taught; it is in all times and in the memory.
        doubt: How far the board's measurements of itself are from what its profile promises; empty if they are near.
        asked: What the strategy or the job asked for; None where the planner chose.
    """

    widths: tuple[int, ...]
    density: float
    prediction: Prediction
    limits: tuple[PlanLimit, ...]
    bound: str
    correction: Correction = NO_CORRECTION
    accumulate: int = 1
    notes: tuple[str, ...] = ()
    warning: str = ""
    doubt: str = ""
    asked: AskedShare | None = None

    @property
    def before_rounds(self) -> Prediction:
        """The prediction by profile and probe alone, at the same widths, without what rounds taught."""
        p, c = self.prediction, self.correction
        return replace(
            p,
            step_s=p.step_s / c.step,
            train_s=p.train_s / c.step,
            latency_s=p.latency_s / c.latency,
            evaluate_s=p.evaluate_s / c.latency,
            memory_bytes=p.memory.uncorrected,
            step_j=None if p.step_j is None else p.step_j / c.step,
            train_j=None if p.train_j is None else p.train_j / c.step,
            latency_j=None if p.latency_j is None else p.latency_j / c.latency,
        )

    def limit_of(self, name: str) -> PlanLimit:
        """The limit of that name. Raises `KeyError` if this plan has no such limit."""
        return next(limit for limit in self.limits if limit.name == name)

    def repeats(self, share: float = 1.0) -> float:
        """The number of times that a round's training fits the limits of time and energy, if a step costs `share` of
        the planned one; infinite without limits."""
        p = self.prediction
        used = {TIME: TIME_MARGIN * p.train_s * share, ENERGY: (p.train_j or 0.0) * share}
        reserved = {TIME: TIME_MARGIN * (p.round_s - p.train_s), ENERGY: 0.0}
        repeats = [(m.limit - reserved[m.name]) / used[m.name] for m in self.limits if used.get(m.name)]
        return min(repeats, default=math.inf)

    def describe(self, full_parameters: int | None = None) -> str:
        """Lines for people: `summary_lines`, every limit with the binding one marked, and the notes."""
        lines = self.summary_lines(full_parameters)
        for limit in self.limits:
            mark = "  <- binds" if limit.name == self.bound else ""
            lines.append(f"  {limit.describe()}{mark}")
            if limit.name == MEMORY:
                free = amount(limit.limit - limit.value, "bytes")
                lines.append(f"    {memory_terms(self.prediction.memory)}, {free} left")
        if unbound := self.unbound_line():
            lines.append(f"  {unbound}")
        return "\n".join([*lines, *self.notes])

    def unbound_line(self) -> str:
        """A line that says that no limit binds; empty where one does."""
        if self.bound != NOTHING_BINDS:
            return ""
        # The whole model is always tried first, unless the density was not the planner's to choose.
        reason = "the whole model fits" if self.density == 1 else f"density {self.density:.3g}, as asked"
        return f"nothing binds: {reason}"

    def summary_lines(self, full_parameters: int | None = None) -> list[str]:
        """Lines on the width, the costs and what was learnt. With the parameters of the whole model they say which
        share of the weights is kept, which is less than the density: a layer loses inputs as well as outputs."""
        p = self.prediction
        weights_text = f"{p.parameters:,}"
        if full_parameters:
            weights_text = (
                f"keeps {p.parameters / full_parameters:.0%} of the weights: {weights_text} of {full_parameters:,}"
            )
        step_text, tests_text = amount(p.step_s, "s"), amount(p.evaluate_s, "s")
        lines = [
            f"density {self.density:.3g} ({weights_text} parameters, {p.forward_macs:,} MACs per sample)",
            f"a round: {p.steps} steps of {step_text}, {tests_text} of tests, {amount(p.transfer_s, 's')} on the link",
            f"a prediction: {amount(p.latency_s, 's')}{self._energy_text()}",
        ]
        if self.correction != NO_CORRECTION:
            correction, learnt_bytes = self.correction, p.memory.learnt
            direction = "more" if learnt_bytes > 0 else "less"
            memory = f", {amount(abs(learnt_bytes), 'bytes')} {direction} memory" if learnt_bytes else ""
            times = f"steps take {correction.step:.2f}, predictions {correction.latency:.2f} times as long"
            lines.append(f"learnt from its rounds: {times}{memory}")
        return lines

    def _energy_text(self) -> str:
        p = self.prediction
        if p.step_j is None or p.train_j is None or p.latency_j is None:
            return ""
        step_text, round_text, latency_text = (amount(value, "J") for value in (p.step_j, p.train_j, p.latency_j))
        return f"; {step_text} per step, {round_text} per round, {latency_text} per prediction"

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "widths": list(self.widths),
            "prediction": {**vars(self.prediction), "memory": dict(vars(self.prediction.memory))},
            "limits": [dict(vars(m)) for m in self.limits],
            "correction": dict(vars(self.correction)),
            "notes": list(self.notes),
            "asked": self.asked and vars(self.asked) | {"widths": list(self.asked.widths)},
        }

    @classmethod
    def from_dict(cls, body: object) -> WidthPlan:
        """Read and check what `to_dict` writes. Raises `PlanError` if it is something else."""
        plan = convert_record(cls, body, "plan", PlanError)
        names, units = {limit.name for limit in plan.limits}, {limit.unit for limit in plan.limits}
        if (
            not names <= set(LIMIT_NAMES)
            or not units <= {"bytes", "s", "J"}
            or plan.bound not in (*LIMIT_NAMES, NOTHING_BINDS)
        ):
            raise PlanError("plan: an unknown limit or unit", got=(sorted(names), sorted(units), plan.bound))
        if not 0 < plan.density <= 1 or any(w < 1 for w in plan.widths) or plan.accumulate < 1:
            got = (plan.density, plan.widths, plan.accumulate)
            raise PlanError("plan: density, widths or accumulate are out of range", got=got)
        return plan


def memory_terms(use: MemoryBreakdown) -> str:
    terms = sorted(((getattr(use, name), title) for name, title in _TITLE_OF_TERM.items()), key=lambda term: -term[0])
    return ", ".join(f"{title} {amount(count, 'bytes')}" for count, title in terms if count)


_TITLE_OF_TERM = {
    "samples": "samples",
    "activations": "activations",
    "weights": "weights and optimiser state",
    "process": "process",
    "graph": "loaded graph",
    "learnt": "learnt from its rounds",
}
