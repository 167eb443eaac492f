"""A plan: what will be done, step by step, and how each step is undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanStep:
    """One step: what is done, and how it is undone."""

    what: str
    reverse: str


def described(steps: Sequence[PlanStep]) -> str:
    """A plan as people read it."""
    return "\n".join(f"{number}. {s.what}\n   undone by: {s.reverse}" for number, s in enumerate(steps, 1))
