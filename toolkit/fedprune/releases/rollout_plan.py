"""A rollout's plan: what is rolled out, and in which stages to which boards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass

from fedprune.core.errors import ConfigError, value_text
from fedprune.core.settings import bounded, check_fields

# More stages than anybody plans by hand; a report looks at all that have begun.
MAX_STAGES = 32
MAX_SECONDS = 366 * 86_400.0


@dataclass(frozen=True)
class Stage:
    """One step of a rollout.

    Attributes:
        share: Share of the fleet that has it when this stage is over, above 0; at least one board more than before.
        success: Share of the stage's boards that must do well before the next stage begins.
        errors: Share of the stage's boards that may fail; one more stops the rollout.
        seconds: After which boards of the stage that said nothing have failed.
    """

    share: float = bounded(MISSING, 0, 1, above=True)
    success: float = bounded(1.0, 0, 1, above=True)
    errors: float = bounded(0.0, 0, 1, below=True)
    seconds: float = bounded(86_400.0, 0, MAX_SECONDS, above=True)

    def __post_init__(self) -> None:
        check_fields(self, ("stage",))
        if self.success + self.errors > 1 + 1e-9:
            raise ConfigError("a stage's success and errors", expected="at most 1 together", got=self)


# One board, a tenth of the fleet, all.
CAREFUL_STAGES = (Stage(1e-9), Stage(0.1, success=0.9, errors=0.1), Stage(1.0, success=0.9, errors=0.1))


@dataclass(frozen=True)
class RolloutPlan:
    """A rollout's subject and stages.

    Attributes:
        subject: The release's number.
        stages: In order; the last one is all boards.
        board_seconds: After which a board that was given it and reported nothing has failed.
        seed: Decides which boards are early.
    """

    subject: str
    stages: tuple[Stage, ...] = CAREFUL_STAGES
    board_seconds: float = bounded(3600.0, 0, MAX_SECONDS, above=True)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, ("rollout",))
        shares = [s.share for s in self.stages]
        if not 1 <= len(shares) <= MAX_STAGES or shares != sorted(set(shares)) or shares[-1] != 1:
            raise ConfigError("stages of a rollout", expected="growing shares, the last one 1", got=value_text(shares))

    def groups(self, boards: Iterable[str]) -> list[list[str]]:
        """The boards of each stage: in an order that depends on the seed and nothing else."""
        order = sorted(set(boards), key=lambda b: hashlib.sha256(f"{self.seed}/{b}".encode()).digest())
        groups, start = [], 0
        for stage in self.stages:
            # 1e-9: a share that is a whole number of boards must not be rounded up by a floating-point error.
            end = max(math.ceil(stage.share * len(order) - 1e-9), min(start + 1, len(order)))
            groups.append(order[start:end])
            start = end
        return groups
