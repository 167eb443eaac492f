"""Decides which boards get a new release next: one board, then some, then all, while they succeed.

`releases.rollout_plan` has the stages. `Rollout` does no I/O, as the coordinator does none: methods take an event and
the time, and return commands for the server (offer the *subject*, which is the release, to a board).
Its state is plain data. A board has failed if it reports a rollback, or nothing until its deadline. Too many failures
in a stage stop the rollout, with a message that names the boards and reasons.

A report takes as long in a fleet of 20,000 boards as in a fleet of ten: boards are counted by stage and fate, and those
that were given the subject are in a heap by their deadlines.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from fedprune.core.errors import ConfigError, StorageError
from fedprune.core.records import convert_record
from fedprune.core.text import one_line, quantity
from fedprune.releases.rollout_plan import RolloutPlan

FORMAT = "fedprune.rollout/1"
# Outdated deadlines that may stay in the heap of a small rollout; in that of a large one, as many as boards are busy.
_MAX_OUTDATED_DEADLINES = 64


class Fate(str, Enum):
    """One board's progress."""

    WAITING = "waiting"
    GIVEN = "given"
    WELL = "well"
    FAILED = "failed"
    # It left the fleet before it had ended: it counts neither way.
    GONE = "gone"


class RolloutPhase(str, Enum):
    """A rollout's progress."""

    RUNNING = "running"
    # Boards that were given it continue with it; no further board and no further stage begins.
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"

    @property
    def is_under_way(self) -> bool:
        return self in (RolloutPhase.RUNNING, RolloutPhase.PAUSED)


@dataclass
class BoardFate:
    """One board's part in a rollout.

    Attributes:
        stage: The stage that it belongs to, from 0.
        deadline: The time by which it must report; None unless it was given the subject.
    """

    stage: int
    fate: Fate = Fate.WAITING
    deadline: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "fate": self.fate.value, "deadline": self.deadline, "reason": self.reason}


@dataclass(frozen=True)
class Give:
    """Offer the rollout's subject to a board."""

    board: str


@dataclass(frozen=True)
class Withdraw:
    """Stop offering it to a board; a board that has it keeps it."""

    board: str


@dataclass(frozen=True)
class TickAt:
    """Call `tick` at this time."""

    at: float


RolloutCommand = Give | Withdraw | TickAt


@dataclass
class Rollout:
    """A rollout's state; its methods take the time of a monotonic clock, in seconds.

    Attributes:
        boards: Each board's part, which only methods of this class change.
        stage_ends: For each stage that has begun, the time after which its boards have failed.
        why: The reason why it stopped or is paused.
        now: The last time that it was given: after a restart the clock continues from there.
        busy_boards: Boards that were given the subject and haven't reported an end, in the order in which they got it.
        changed_boards: Boards whose parts have changed since `mark_saved`.
    """

    plan: RolloutPlan
    boards: dict[str, BoardFate] = field(default_factory=dict)
    stage: int = -1
    stage_ends: list[float] = field(default_factory=list)
    phase: RolloutPhase = RolloutPhase.RUNNING
    why: str = ""
    now: float = 0.0
    busy_boards: dict[str, None] = field(init=False, repr=False, compare=False, default_factory=dict)
    changed_boards: set[str] = field(init=False, repr=False, compare=False, default_factory=set)

    def __post_init__(self) -> None:
        self._counts = [Counter[Fate]() for _ in self.plan.stages]
        self._deadlines: list[tuple[float, str]] = []
        for name, board in self.boards.items():
            self._counts[board.stage][board.fate] += 1
            if board.fate is Fate.GIVEN:
                self.busy_boards[name] = None
        self._sort_deadlines()

    @classmethod
    def for_boards(cls, plan: RolloutPlan, boards: Iterable[str]) -> Rollout:
        """A rollout to some boards, which `tick` begins. Raises `ConfigError` if there are no boards."""
        groups = plan.groups(boards)
        fates = {board: BoardFate(number) for number, group in enumerate(groups) for board in group}
        if not fates:
            raise ConfigError("a rollout to no boards", expected="at least one")
        return cls(plan, fates)

    def tick(self, now: float) -> list[RolloutCommand]:
        if not self.phase.is_under_way:
            return []
        self.now = now
        while (first := self._next_deadline()) is not None and first[0] <= now:
            self._fail(first[1], "said nothing until its deadline")
        ended = {n for n, end in enumerate(self.stage_ends) if now >= end and self._counts[n][Fate.GIVEN]}
        for name in [n for n in self.busy_boards if self.boards[n].stage in ended] if ended else ():
            self._fail(name, "its stage's time is over")
        return self._advance(now)

    def report_success(self, name: str, now: float) -> list[RolloutCommand]:
        """Count a board's report of success; it is ignored if the board wasn't given anything, or reports too late."""
        return self._accept_report(name, now, Fate.WELL)

    def report_failure(self, name: str, reason: str, now: float) -> list[RolloutCommand]:
        """Count a board's report of a rollback, also after its success."""
        board = self.boards.get(name)
        if not self.phase.is_under_way or board is None or board.fate not in (Fate.GIVEN, Fate.WELL):
            return []
        self._fail(name, one_line(reason, 300) or "without a reason")
        return self.tick(now)

    @property
    def stage_count(self) -> int:
        """The number of stages up to the last that has boards, or has begun."""
        return 1 + max([0, self.stage, *(n for n, counts in enumerate(self._counts) if counts.total())])

    def report_progress(self, name: str, now: float, seconds: float) -> list[RolloutCommand]:
        """Count a board's report of progress: it fails unless it reports again within this many seconds."""
        return self._accept_report(name, now, Fate.GIVEN, now + seconds)

    def restore_deadlines(self, now: float) -> list[RolloutCommand]:
        """Give busy boards their full time again, since they couldn't report for a while, as when the server was
        down."""
        if not self.phase.is_under_way:
            return []
        until = now + self.plan.board_seconds
        for name in self.busy_boards:
            if (deadline := self.boards[name].deadline) is not None and deadline < until:
                self._change(name, Fate.GIVEN, until)
        self.stage_ends = [max(end, until) for end in self.stage_ends]
        return self.tick(now)

    def add_board(self, name: str, now: float) -> list[RolloutCommand]:
        """Add a board to the last stage: a new one, or one that had left the fleet."""
        former = self.boards.get(name)
        if not self.phase.is_under_way or (former is not None and former.fate is not Fate.GONE):
            return []
        if former is not None:
            self._counts[former.stage][former.fate] -= 1
        self.boards[name] = BoardFate(len(self.plan.stages) - 1)
        self._counts[-1][Fate.WAITING] += 1
        self.changed_boards.add(name)
        may_begin = self.phase is RolloutPhase.RUNNING and self.stage == len(self.plan.stages) - 1
        commands = [self._give_to(name, now)] if may_begin else []
        return [*commands, *self.tick(now)]

    def remove_boards(self, names: Iterable[str], now: float) -> list[RolloutCommand]:
        """Remove boards that left the fleet: finished ones still count, the others count neither way.

        A stage that has lost all its boards gets one of a later stage, so that no stage passes without a board.
        """
        if not self.phase.is_under_way:
            return []
        for name in names:
            board = self.boards.get(name)
            if board is not None and board.fate in (Fate.WAITING, Fate.GIVEN):
                self._change(name, Fate.GONE)
        commands = []
        for number in range(max(self.stage, 0), len(self.plan.stages) - 1):
            waiting = [n for n in sorted(self.boards) if self._is_waiting(n) and self.boards[n].stage > number]
            if waiting and not self._stage_size(number):
                heir = min(waiting, key=lambda n: self.boards[n].stage)
                self._counts[self.boards[heir].stage][Fate.WAITING] -= 1
                self._counts[number][Fate.WAITING] += 1
                self.boards[heir].stage = number
                self.changed_boards.add(heir)
                may_begin = self.phase is RolloutPhase.RUNNING and number == self.stage
                commands += [self._give_to(heir, now)] if may_begin else []
        return [*commands, *self.tick(now)]

    def stop(self, reason: str) -> list[RolloutCommand]:
        return self._halt(f"stopped: {one_line(reason, 300)}") if self.phase.is_under_way else []

    def pause(self, reason: str, now: float) -> list[RolloutCommand]:
        """Pause the rollout: boards that were given it finish, and no others begin."""
        if self.phase is RolloutPhase.RUNNING:
            self.phase, self.why = RolloutPhase.PAUSED, f"paused: {one_line(reason, 300)}"
        return self.tick(now)

    def resume(self, now: float) -> list[RolloutCommand]:
        """Continue a paused rollout; boards that joined its stage meanwhile have all of the stage's time."""
        if self.phase is not RolloutPhase.PAUSED:
            return self.tick(now)
        self.phase, self.why = RolloutPhase.RUNNING, ""
        # Boards that joined while the rollout was paused, or were left when it paused.
        late_boards = [n for n in sorted(self.boards) if self._is_waiting(n) and self.boards[n].stage <= self.stage]
        if late_boards:
            self.stage_ends[self.stage] = max(self.stage_ends[self.stage], now + self.plan.stages[self.stage].seconds)
        return [*(self._give_to(name, now) for name in late_boards), *self.tick(now)]

    def failures(self) -> dict[str, str]:
        return {n: b.reason for n, b in sorted(self.boards.items()) if b.fate is Fate.FAILED}

    def _accept_report(self, name: str, now: float, fate: Fate, deadline: float | None = None) -> list[RolloutCommand]:
        board = self.boards.get(name)
        if not self.phase.is_under_way or board is None or board.fate is not Fate.GIVEN:
            return []
        if board.deadline is not None and now < min(board.deadline, self.stage_ends[board.stage]):
            self._change(name, fate, deadline)
        return self.tick(now)

    def _advance(self, now: float) -> list[RolloutCommand]:
        commands: list[RolloutCommand] = []
        # All stages that have begun: a board may report a rollback after the next stage has begun.
        for number in range(self.stage + 1):
            trouble = self._stop_reason_of_stage(number)
            if trouble:
                return self._halt(trouble)
        while self.phase is RolloutPhase.RUNNING and (self.stage < 0 or self._has_passed(self.stage)):
            if self.stage == len(self.plan.stages) - 1:
                break
            self.stage += 1
            self.stage_ends.append(now + self.plan.stages[self.stage].seconds)
            commands += [self._give_to(name, now) for name in self._boards_of_stage(self.stage)]
        waiting = any(counts[Fate.WAITING] for counts in self._counts)
        if not self.busy_boards and self.stage == len(self.plan.stages) - 1 and not waiting:
            self.phase, self.why = RolloutPhase.DONE, ""
            return commands
        times = [end for n, end in enumerate(self.stage_ends) if self._counts[n][Fate.GIVEN]]
        if (first := self._next_deadline()) is not None:
            times.append(first[0])
        return [*commands, TickAt(min(times, default=math.inf))]  # a paused one may have nothing to wait for

    def _stop_reason_of_stage(self, number: int) -> str:
        """Why a stage stops the rollout; empty if it doesn't."""
        size = self._stage_size(number)
        if self._counts[number][Fate.FAILED] <= self.plan.stages[number].errors * size + 1e-9:
            return ""
        failed_boards = [n for n in self._boards_of_stage(number) if self.boards[n].fate is Fate.FAILED]
        reasons = "; ".join(f"{n}: {self.boards[n].reason}" for n in failed_boards[:20])
        more_text = f"; and {len(failed_boards) - 20} more" if len(failed_boards) > 20 else ""
        return f"stage {number + 1}: {len(failed_boards)} of {quantity(size, 'board')} failed ({reasons}{more_text})"

    def _has_passed(self, number: int) -> bool:
        return self._counts[number][Fate.WELL] >= self.plan.stages[number].success * self._stage_size(number) - 1e-9

    def _stage_size(self, number: int) -> int:
        """The number of boards of a stage that count."""
        return self._counts[number].total() - self._counts[number][Fate.GONE]

    def _boards_of_stage(self, number: int) -> list[str]:
        return sorted(n for n, b in self.boards.items() if b.stage == number and b.fate is not Fate.GONE)

    def _is_waiting(self, name: str) -> bool:
        return self.boards[name].fate is Fate.WAITING

    def _give_to(self, name: str, now: float) -> RolloutCommand:
        self._change(name, Fate.GIVEN, now + self.plan.board_seconds)
        return Give(name)

    def _fail(self, name: str, reason: str) -> None:
        self.boards[name].reason = reason
        self._change(name, Fate.FAILED)

    def _halt(self, reason: str) -> list[RolloutCommand]:
        self.phase, self.why = RolloutPhase.STOPPED, reason
        # Offers are withdrawn in the order of names, so that the same events give the same commands.
        withdrawn = sorted(self.busy_boards)
        for name in withdrawn:
            self._change(name, Fate.WAITING)
        return [Withdraw(name) for name in withdrawn]

    def _change(self, name: str, fate: Fate, deadline: float | None = None) -> None:
        board = self.boards[name]
        counts = self._counts[board.stage]
        counts[board.fate] -= 1
        counts[fate] += 1
        board.fate, board.deadline = fate, deadline
        self.changed_boards.add(name)
        if fate is not Fate.GIVEN:
            self.busy_boards.pop(name, None)
            return
        self.busy_boards[name] = None
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, name))
        if len(self._deadlines) > 2 * len(self.busy_boards) + _MAX_OUTDATED_DEADLINES:
            self._sort_deadlines()

    def _sort_deadlines(self) -> None:
        """Make the heap anew, without outdated deadlines."""
        deadlines = ((self.boards[name].deadline, name) for name in self.busy_boards)
        self._deadlines = [(deadline, name) for deadline, name in deadlines if deadline is not None]
        heapq.heapify(self._deadlines)

    def _next_deadline(self) -> tuple[float, str] | None:
        while self._deadlines:
            deadline, name = self._deadlines[0]
            if name in self.busy_boards and self.boards[name].deadline == deadline:
                return deadline, name
            heapq.heappop(self._deadlines)
        return None

    def mark_saved(self) -> None:
        """Forget the recorded changes, which are saved now."""
        self.changed_boards.clear()

    def to_dict_without_boards(self) -> dict[str, Any]:
        """The record without the boards, which are saved one by one."""
        body = {"stage": self.stage, "stage_ends": list(self.stage_ends), "phase": self.phase.value, "why": self.why}
        return {"format": FORMAT, "plan": asdict(self.plan), **body, "now": self.now}

    def to_dict(self) -> dict[str, Any]:
        boards = {name: board.to_dict() for name, board in sorted(self.boards.items())}
        return {**self.to_dict_without_boards(), "boards": boards}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Rollout:
        """Read what `to_dict` wrote. Raises `StorageError` if it is something else."""
        try:
            if body["format"] != FORMAT:
                raise ValueError(body["format"])
            plan: RolloutPlan = convert_record(RolloutPlan, body["plan"], "plan", StorageError)
            boards = {str(n): BoardFate(**{**b, "fate": Fate(b["fate"])}) for n, b in body["boards"].items()}
            stage, stage_ends = int(body["stage"]), [float(e) for e in body["stage_ends"]]
            if not -1 <= stage < len(plan.stages) or len(stage_ends) != stage + 1:
                raise ValueError("stage")
            if not all(0 <= b.stage < len(plan.stages) for b in boards.values()):
                raise ValueError("a board's stage")
            phase, reason, now = RolloutPhase(body["phase"]), str(body["why"]), float(body["now"])
            return cls(plan, boards, stage=stage, stage_ends=stage_ends, phase=phase, why=reason, now=now)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
            raise StorageError(f"the record of a rollout is not one ({error!r})") from error
