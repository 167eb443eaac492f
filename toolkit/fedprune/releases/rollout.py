"""The state machine of a staged rollout: to one board, then to some, then to all, as long as they succeed.

It serves releases of the runtime, models and bundles. Like the coordinator it does no I/O: events come with the time,
commands are returned, and the state is plain data. A board that reports a rollback, or nothing until its deadline, has
failed; a stage with too many failures stops the rollout, which names the boards and reasons.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field
from enum import Enum
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, StorageError, shown
from fedprune.core.settings import bounded, check_fields
from fedprune.core.text import one_line, quantity

FORMAT = "fedprune.rollout/1"
MAX_STAGES = 32
MAX_SECONDS = 366 * 86_400.0
KINDS = ("release", "model", "bundle")


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
        check_fields(self, "{} of a stage")
        if self.success + self.errors > 1 + 1e-9:
            raise ConfigError("a stage's success and errors", expected="at most 1 together", got=self)


CAREFUL = (Stage(1e-9), Stage(0.1, success=0.9, errors=0.1), Stage(1.0, success=0.9, errors=0.1))
"""One board, a tenth of the fleet, all."""


@dataclass(frozen=True)
class RolloutPlan:
    """A rollout's subject and stages.

    Attributes:
        kind: One of `KINDS`.
        subject: The release's number, or the digest of a model or bundle.
        stages: In order; the last one is all boards.
        board_seconds: After which a board that was given it and reported nothing has failed.
        seed: Decides which boards are early.
    """

    kind: str
    subject: str
    stages: tuple[Stage, ...] = CAREFUL
    board_seconds: float = bounded(3600.0, 0, MAX_SECONDS, above=True)
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "{} of a rollout")
        validation.word("kind of a rollout", self.kind, KINDS)
        shares = [s.share for s in self.stages]
        if not 1 <= len(shares) <= MAX_STAGES or shares != sorted(set(shares)) or shares[-1] != 1:
            raise ConfigError("stages of a rollout", expected="shares that grow, the last one 1", got=shown(shares))

    def groups(self, boards: Iterable[str]) -> list[list[str]]:
        """The boards of each stage: in an order that depends on the seed and nothing else."""
        order = sorted(set(boards), key=lambda b: hashlib.sha256(f"{self.seed}/{b}".encode()).digest())
        groups, begun = [], 0
        for stage in self.stages:
            end = max(math.ceil(stage.share * len(order) - 1e-9), min(begun + 1, len(order)))
            groups.append(order[begun:end])
            begun = end
        return groups


class Fate(str, Enum):
    """One board's progress."""

    WAITING = "waiting"
    GIVEN = "given"
    WELL = "well"
    FAILED = "failed"
    GONE = "gone"
    """It left the fleet before it had ended: it counts neither way."""


class RolloutPhase(str, Enum):
    """A rollout's progress."""

    RUNNING = "running"
    PAUSED = "paused"
    """Boards that were given it continue with it; no further board and no further stage begins."""
    DONE = "done"
    STOPPED = "stopped"

    @property
    def under_way(self) -> bool:
        return self in (RolloutPhase.RUNNING, RolloutPhase.PAUSED)


@dataclass
class BoardFate:
    """One board's part. The deadline is None unless the board was given the new thing."""

    stage: int
    fate: Fate = Fate.WAITING
    deadline: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Give:
    """Offer the new thing to a board."""

    board: str


@dataclass(frozen=True)
class Withdraw:
    """Stop offering it to a board; a board that has it keeps it."""

    board: str


@dataclass(frozen=True)
class Wake:
    """Call `tick` at this time."""

    at: float


RolloutCommand = Give | Withdraw | Wake


@dataclass
class Rollout:
    """A rollout's state; its methods take the time of a monotonic clock, in seconds.

    Attributes:
        stage: The current or last stage.
        stage_ends: For each stage that has begun, the time after which its boards have failed.
        why: The reason why it stopped or is paused.
        now: The last time that it was given: after a restart the clock continues from there.
    """

    plan: RolloutPlan
    boards: dict[str, BoardFate] = field(default_factory=dict)
    stage: int = -1
    stage_ends: list[float] = field(default_factory=list)
    phase: RolloutPhase = RolloutPhase.RUNNING
    why: str = ""
    now: float = 0.0

    @classmethod
    def of(cls, plan: RolloutPlan, boards: Iterable[str]) -> Rollout:
        """A rollout to some boards, which `tick` begins. Raises `ConfigError` if there are no boards."""
        groups = plan.groups(boards)
        fates = {board: BoardFate(number) for number, group in enumerate(groups) for board in group}
        if not fates:
            raise ConfigError("a rollout to no boards", expected="at least one")
        return cls(plan, fates)

    def tick(self, now: float) -> list[RolloutCommand]:
        if not self.phase.under_way:
            return []
        self.now = now
        for name in sorted(self.boards):
            board = self.boards[name]
            if board.fate is Fate.GIVEN:
                late, over = board.deadline is not None and now >= board.deadline, now >= self.stage_ends[board.stage]
                if late or over:
                    self._fail(board, "said nothing until its deadline" if late else "its stage's time is over")
        return self._onward(now)

    def well(self, name: str, now: float) -> list[RolloutCommand]:
        """A board reports success; ignored where it wasn't given anything, or too late."""
        board = self.boards.get(name)
        if not self.phase.under_way or board is None or board.fate is not Fate.GIVEN:
            return []
        if board.deadline is not None and now < min(board.deadline, self.stage_ends[board.stage]):
            board.fate, board.deadline = Fate.WELL, None
        return self.tick(now)

    def failed(self, name: str, reason: str, now: float) -> list[RolloutCommand]:
        """A board reports a rollback, also after its success."""
        board = self.boards.get(name)
        if not self.phase.under_way or board is None or board.fate not in (Fate.GIVEN, Fate.WELL):
            return []
        self._fail(board, one_line(reason, 300) or "without a reason")
        return self.tick(now)

    @property
    def stages(self) -> int:
        """The number of stages up to the last that has boards, or has begun."""
        return 1 + max(0, self.stage, *(board.stage for board in self.boards.values()))

    def heard(self, name: str, now: float, seconds: float) -> list[RolloutCommand]:
        """A board reports progress: it fails unless it reports again within this many seconds."""
        board = self.boards.get(name)
        if not self.phase.under_way or board is None or board.fate is not Fate.GIVEN:
            return []
        if board.deadline is not None and now < min(board.deadline, self.stage_ends[board.stage]):
            board.deadline = now + seconds
        return self.tick(now)

    def resumed(self, now: float) -> list[RolloutCommand]:
        """Boards couldn't report for a while, as when the server was down: those that are busy get their full time
        again."""
        if not self.phase.under_way:
            return []
        until = now + self.plan.board_seconds
        for board in self.boards.values():
            if board.fate is Fate.GIVEN and board.deadline is not None:
                board.deadline = max(board.deadline, until)
        self.stage_ends = [max(end, until) for end in self.stage_ends]
        return self.tick(now)

    def join(self, name: str, now: float) -> list[RolloutCommand]:
        """Add a board to the last stage: a new one, or one that had left the fleet."""
        known = self.boards.get(name)
        if not self.phase.under_way or (known is not None and known.fate is not Fate.GONE):
            return []
        self.boards[name] = BoardFate(len(self.plan.stages) - 1)
        begun = self.phase is RolloutPhase.RUNNING and self.stage == len(self.plan.stages) - 1
        given = [self._give(name, now)] if begun else []
        return [*given, *self.tick(now)]

    def without(self, names: Iterable[str], now: float) -> list[RolloutCommand]:
        """Remove boards that left the fleet: finished ones still count, the others count neither way.

        A stage that has lost all its boards gets one of a later stage, so that no stage passes without a board.
        """
        if not self.phase.under_way:
            return []
        for name in names:
            board = self.boards.get(name)
            if board is not None and board.fate in (Fate.WAITING, Fate.GIVEN):
                board.fate, board.deadline = Fate.GONE, None
        given = []
        for number in range(max(self.stage, 0), len(self.plan.stages) - 1):
            later = [n for n in sorted(self.boards) if self._waits(n) and self.boards[n].stage > number]
            if later and not self._of(number):
                heir = min(later, key=lambda n: self.boards[n].stage)
                self.boards[heir].stage = number
                begun = self.phase is RolloutPhase.RUNNING and number == self.stage
                given += [self._give(heir, now)] if begun else []
        return [*given, *self.tick(now)]

    def stop(self, reason: str) -> list[RolloutCommand]:
        return self._halt(f"stopped: {one_line(reason, 300)}") if self.phase.under_way else []

    def pause(self, reason: str, now: float) -> list[RolloutCommand]:
        """Pause the rollout: boards that were given it finish, and no others begin."""
        if self.phase is RolloutPhase.RUNNING:
            self.phase, self.why = RolloutPhase.PAUSED, f"paused: {one_line(reason, 300)}"
        return self.tick(now)

    def go_on(self, now: float) -> list[RolloutCommand]:
        """Continue a paused rollout; boards that joined its stage meanwhile have all of the stage's time."""
        if self.phase is not RolloutPhase.PAUSED:
            return self.tick(now)
        self.phase, self.why = RolloutPhase.RUNNING, ""
        late = [n for n in sorted(self.boards) if self._waits(n) and self.boards[n].stage <= self.stage]
        if late:
            self.stage_ends[self.stage] = max(self.stage_ends[self.stage], now + self.plan.stages[self.stage].seconds)
        return [*(self._give(name, now) for name in late), *self.tick(now)]

    def failures(self) -> dict[str, str]:
        return {n: b.reason for n, b in sorted(self.boards.items()) if b.fate is Fate.FAILED}

    def _onward(self, now: float) -> list[RolloutCommand]:
        commands: list[RolloutCommand] = []
        for number in range(self.stage + 1):
            trouble = self._trouble(number)
            if trouble:
                return self._halt(trouble)
        while self.phase is RolloutPhase.RUNNING and (self.stage < 0 or self._passed(self.stage)):
            if self.stage == len(self.plan.stages) - 1:
                break
            self.stage += 1
            self.stage_ends.append(now + self.plan.stages[self.stage].seconds)
            commands += [self._give(name, now) for name in self._of(self.stage)]
        open_boards = [b for b in self.boards.values() if b.fate is Fate.GIVEN]
        if not open_boards and self.stage == len(self.plan.stages) - 1 and not any(map(self._waits, self.boards)):
            self.phase, self.why = RolloutPhase.DONE, ""
            return commands
        ends = (min(b.deadline or math.inf, self.stage_ends[b.stage]) for b in open_boards)
        return [*commands, Wake(min(ends, default=math.inf))]  # a paused one may have nothing to wait for

    def _trouble(self, number: int) -> str:
        """Why a stage stops the rollout; empty if it doesn't."""
        stage, names = self.plan.stages[number], self._of(number)
        bad = [n for n in names if self.boards[n].fate is Fate.FAILED]
        if len(bad) > stage.errors * len(names) + 1e-9:
            told = "; ".join(f"{n}: {self.boards[n].reason}" for n in bad[:20])
            more = f"; and {len(bad) - 20} more" if len(bad) > 20 else ""
            return f"stage {number + 1}: {len(bad)} of {quantity(len(names), 'board')} failed ({told}{more})"
        return ""

    def _passed(self, number: int) -> bool:
        names = self._of(number)
        well = sum(self.boards[n].fate is Fate.WELL for n in names)
        return well >= self.plan.stages[number].success * len(names) - 1e-9

    def _of(self, number: int) -> list[str]:
        return sorted(n for n, b in self.boards.items() if b.stage == number and b.fate is not Fate.GONE)

    def _waits(self, name: str) -> bool:
        return self.boards[name].fate is Fate.WAITING

    def _give(self, name: str, now: float) -> RolloutCommand:
        board = self.boards[name]
        board.fate, board.deadline = Fate.GIVEN, now + self.plan.board_seconds
        return Give(name)

    def _fail(self, board: BoardFate, reason: str) -> None:
        board.fate, board.deadline, board.reason = Fate.FAILED, None, reason

    def _halt(self, why: str) -> list[RolloutCommand]:
        self.phase, self.why = RolloutPhase.STOPPED, why
        given = sorted(n for n, b in self.boards.items() if b.fate is Fate.GIVEN)
        for name in given:
            self.boards[name].fate, self.boards[name].deadline = Fate.WAITING, None
        return [Withdraw(name) for name in given]

    def to_dict(self) -> dict[str, Any]:
        boards = {n: {**asdict(b), "fate": b.fate.value} for n, b in sorted(self.boards.items())}
        body = {"stage": self.stage, "stage_ends": list(self.stage_ends), "phase": self.phase.value, "why": self.why}
        body["now"] = self.now
        return {"format": FORMAT, "plan": asdict(self.plan), "boards": boards, **body}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Rollout:
        """Read what `to_dict` wrote. Raises `StorageError` if it is something else."""
        try:
            if body["format"] != FORMAT:
                raise ValueError(body["format"])
            plan: RolloutPlan = validation.restored(RolloutPlan, body["plan"])
            boards = {str(n): BoardFate(**{**b, "fate": Fate(b["fate"])}) for n, b in body["boards"].items()}
            stage, ends = int(body["stage"]), [float(e) for e in body["stage_ends"]]
            if not -1 <= stage < len(plan.stages) or len(ends) != stage + 1:
                raise ValueError("stage")
            if not all(0 <= b.stage < len(plan.stages) for b in boards.values()):
                raise ValueError("a board's stage")
            phase, why, now = RolloutPhase(body["phase"]), str(body["why"]), float(body["now"])
            return cls(plan, boards, stage, ends, phase, why, now)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
            raise StorageError(f"the record of a rollout is not one ({error!r})") from error
