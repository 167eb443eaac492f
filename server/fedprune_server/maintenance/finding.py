"""One finding of `check` or `doctor`: what is wrong, why it matters, what to do, and what a repair would do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fedprune.core.text import sentences
from fedprune_server.monitoring.alerts import INFO, Alert


class Severity(str, Enum):
    """How bad a finding is: a note can wait, what is wrong can't; what is unknown wasn't looked at."""

    WRONG = "wrong"
    UNKNOWN = "unknown"
    NOTE = "note"


class Repair(str, Enum):
    """The repair of a finding by `check --repair`."""

    NONE = "none"
    DELETE = "delete"
    SET_ASIDE = "set aside"
    FETCH = "fetch"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, will be, or is worth knowing.

    Attributes:
        advice: What to do, with a command where there is one.
        paths: The files that it is about.
        blob: Digest of the blob that it is about.
        keys: The objects of a bucket that it is about.
        kind: For `doctor`: a short name, the same in every version, because scripts compare it.
        why: For `doctor`: its consequence.
    """

    severity: Severity
    message: str
    advice: str = ""
    repair: Repair = Repair.NONE
    paths: tuple[Path, ...] = ()
    blob: str = ""
    keys: tuple[str, ...] = ()
    kind: str = ""
    why: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.severity is Severity.WRONG

    def to_dict(self) -> dict[str, Any]:
        severity = self.severity.value
        return {"kind": self.kind, "weight": severity, "what": self.message, "why": self.why, "todo": self.advice}

    def __str__(self) -> str:
        if self.kind:
            return f"{self.severity.value}: {self.message}\n  why: {self.why}\n  do:  {self.advice}"
        return sentences(f"{self.severity.value}: {self.message}", self.advice)


def wrong_finding(kind: str, what: str, why: str, advice: str) -> Finding:
    """A finding of `doctor` that needs action."""
    return Finding(Severity.WRONG, what, advice, kind=kind, why=why)


def unknown_finding(kind: str, what: str, why: str, advice: str) -> Finding:
    """What `doctor` couldn't look at in time; it may be right or wrong."""
    return Finding(Severity.UNKNOWN, what, advice, kind=kind, why=why)


def note_finding(kind: str, what: str, why: str, advice: str) -> Finding:
    """A finding of `doctor` that is worth knowing."""
    return Finding(Severity.NOTE, what, advice, kind=kind, why=why)


def alert_finding(alert: Alert) -> Finding:
    """An alert as a finding; one that only informs is a note."""
    return (note_finding if alert.severity == INFO else wrong_finding)(alert.kind, alert.what, alert.why, alert.todo)
