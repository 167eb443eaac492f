"""The state of updates: which slot is stable, and whether the other one is staged or on trial.

    stable --stage--> staged --arm--> trial --commit--> stable (the other slot)
                         |              |
                         +--------------+--roll back--> stable (the same slot), with the reason

A trial has a number of attempts, each with a deadline on the monotonic clock. No date decides anything, because a
board's clock may be wrong. The launcher includes this module, so it imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SLOTS = ("a", "b")
STABLE, STAGED, TRIAL = "stable", "staged", "trial"
COMMITTED, ROLLED_BACK = "committed", "rolled back"

MAX_STARTS = 1000  # of starts of a staged release, and of attempts of a trial
MAX_ATTEMPT_S = 3600.0  # of an attempt


class DamagedError(Exception):
    """A slot or a record is not what was written."""


@dataclass(frozen=True)
class UpdateOutcome:
    """How the last update ended, for the server: `COMMITTED`, or `ROLLED_BACK` for a reason."""

    version: int
    result: str
    reason: str = ""


@dataclass(frozen=True)
class LauncherState:
    """The launcher's state.

    Attributes:
        stable: The slot that ran well last.
        phase: `STABLE`, `STAGED` (the other slot is installed) or `TRIAL` (it is being tried).
        left: Starts that a staged release may still wait for its trial, or attempts left of the trial.
        seconds: Deadline of an attempt.
        highest: The highest release number that was ever staged; only higher ones may follow.
        trouble: How the trial's last attempt ended.
        outcome: How the last update ended.
        sequence: Number of the write.
    """

    stable: str
    phase: str = STABLE
    left: int = 0
    seconds: float = 0.0
    highest: int = 0
    trouble: str = ""
    outcome: UpdateOutcome | None = None
    sequence: int = 0

    @property
    def other_slot(self) -> str:
        return SLOTS[1] if self.stable == SLOTS[0] else SLOTS[0]

    def stage(self, version: int, starts: int) -> LauncherState:
        return replace(self, phase=STAGED, left=starts, highest=max(self.highest, version), trouble="")

    def arm(self, attempts: int, seconds: float) -> LauncherState:
        return replace(self, phase=TRIAL, left=attempts, seconds=seconds, trouble="")

    def use_attempt(self) -> LauncherState:
        return replace(self, left=self.left - 1)

    def commit(self) -> LauncherState:
        outcome = UpdateOutcome(self.highest, COMMITTED)
        return replace(self, stable=self.other_slot, phase=STABLE, left=0, trouble="", outcome=outcome)

    def roll_back(self, reason: str) -> LauncherState:
        outcome = UpdateOutcome(self.highest, ROLLED_BACK, flat_line(reason))
        return replace(self, phase=STABLE, left=0, trouble="", outcome=outcome)

    def fail_attempt(self, reason: str) -> LauncherState:
        """Note that an attempt failed; after the last one the trial is rolled back."""
        return self.roll_back(reason) if self.left <= 0 else replace(self, trouble=flat_line(reason))

    def fall_back(self, version: int, reason: str) -> LauncherState:
        outcome = UpdateOutcome(version, ROLLED_BACK, flat_line(reason))
        return LauncherState(self.other_slot, highest=self.highest, outcome=outcome)

    @classmethod
    def from_document(cls, body: Any) -> LauncherState:
        try:
            state = cls(**{**body, "outcome": UpdateOutcome(**body["outcome"]) if body["outcome"] else None})
            numbers = (state.left, state.highest, state.sequence)
            if (
                state.stable not in SLOTS
                or state.phase not in (STABLE, STAGED, TRIAL)
                or not all(isinstance(n, int) and n >= 0 for n in numbers)
                or state.left > MAX_STARTS
                or not 0 <= state.seconds <= MAX_ATTEMPT_S
            ):
                raise ValueError("a value is out of range")
        except (TypeError, KeyError, ValueError) as error:
            raise DamagedError(f"the launcher's state is not one ({error})") from error
        return state


def flat_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
