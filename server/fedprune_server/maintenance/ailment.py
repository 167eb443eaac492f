"""A finding of `fedprune-server doctor`: what is wrong with a fleet, why it matters, and the command to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedprune_server.maintenance.finding import Finding, Weight
from fedprune_server.monitoring.alerts import INFO, Alert


@dataclass(frozen=True)
class Ailment:
    """Something that is wrong, or will be.

    Attributes:
        kind: A short name of what it is, the same in every version.
        weight: How bad it is: a note needn't be seen to today.
        what: What it is, naming it.
        why: What comes of it.
        todo: What to do, in words; a command where there is one.
    """

    kind: str
    weight: Weight
    what: str
    why: str
    todo: str

    @property
    def wrong(self) -> bool:
        """Whether it is more than a note."""
        return self.weight is Weight.WRONG

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"kind": self.kind, "weight": self.weight.value, "what": self.what, "why": self.why, "todo": self.todo}

    def __str__(self) -> str:
        return f"{self.weight.value}: {self.what}\n  why: {self.why}\n  do:  {self.todo}"


def wrong(kind: str, what: str, why: str, todo: str) -> Ailment:
    """One that must be seen to."""
    return Ailment(kind, Weight.WRONG, what, why, todo)


def note(kind: str, what: str, why: str, todo: str) -> Ailment:
    """One that is worth knowing."""
    return Ailment(kind, Weight.NOTE, what, why, todo)


def of_finding(finding: Finding, kind: str, why: str) -> Ailment:
    """What `fedprune-server check` finds, too."""
    return Ailment(kind, finding.weight, finding.what, why, finding.advice or "See docs/back-up.md#check.")


def of_alert(alert: Alert) -> Ailment:
    """An alert as a finding: one that only informs is a note."""
    weight = Weight.NOTE if alert.severity == INFO else Weight.WRONG
    return Ailment(alert.kind, weight, alert.what, alert.why, alert.todo)
