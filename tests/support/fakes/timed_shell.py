"""A fleet on a virtual clock, without network or weights: devices that take their time."""

import heapq
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from support.fakes import coordinator_shell
from support.fakes.coordinator_shell import digest


@dataclass
class Board:
    """How a device behaves.

    Attributes:
        seconds: What a round's training takes.
        download_s: What passes between an offer and the first step.
        stalls: The share of its training at which it stops for ever; above 1 for never.
        is_present: Whether it is there.
        uploads: Whether the update that it announces comes.
    """

    seconds: float = 10.0
    download_s: float = 1.0
    stalls: float = 2.0
    is_present: bool = True
    uploads: bool = True


@dataclass
class Timed(coordinator_shell.Shell):
    """Devices at work; what the server does itself takes no time. Offers are by round, device and time."""

    job: Job
    boards: dict[str, Board]
    offered: list[tuple[int, str, float]] = field(default_factory=list)
    max_parts_in_flight: int = 0

    def __post_init__(self) -> None:
        coordinator_shell.Shell.__init__(self, self.job)
        self.later: list[tuple[float, int, on.Event]] = []
        self.session = 0
        self.order = 0

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [
            on.DeviceBorn(n, self.session, {"name": "toy"}, 10) for n, b in sorted(self.boards.items()) if b.is_present
        ]

    def weights(self, command: do.Extract) -> str:
        return "0"

    def update(self, command: do.SendOffer) -> str:
        return digest(command.device, command.round)

    def model(self, command: do.Close) -> str:
        names = [c.part.device for c in command.contributions]
        assert names == sorted(names), "whatever the order of arrival: a strategy's own sums may depend on it"
        return digest("model", [(c.part.device, c.weights, c.weight) for c in command.contributions])

    def at(self, time: float, event: on.Event) -> None:
        self.order += 1
        heapq.heappush(self.later, (time, self.order, event))

    def answer(self, command: do.Command) -> on.Event | None:
        event = super().answer(command)
        match command:
            case do.SendOffer():
                assert isinstance(event, on.UpdateAnnounced)
                self.offered.append((command.round, command.device, self.now))
                self._train(self.boards[command.device], event)
                return None
            case do.PullUpdate() if not self.boards[command.device].uploads:
                return None
            case do.WakeAt():
                self.at(command.at, on.Ticked())
        return event

    def _train(self, board: Board, update: on.UpdateAnnounced) -> None:
        if board.is_present and board.stalls > 1:
            self.at(self.now + board.download_s + board.seconds, update)

    def run(self, *, rounds: int = 0, steps: int = 100_000) -> None:
        """Run to the end, or until so many rounds are over."""
        for _ in range(steps):
            if self.state.phase is Phase.FINISHED or (rounds and len(self.state.history) >= rounds):
                return
            self.step()
        raise AssertionError("the job doesn't come to an end")

    def step(self) -> None:
        """Let the next thing happen."""
        if self.inbox:
            self.feed(self.inbox.pop(0))
        elif self.later:
            time, _, event = heapq.heappop(self.later)
            self.now = max(self.now, time)
            if isinstance(event, on.UpdateAnnounced) and not self.boards[event.device].is_present:
                return
            self.feed(event)
        else:
            raise AssertionError(f"nothing will ever happen in {self.state.phase}")
        if self.state.phase is Phase.TRAINING:
            kinds = ("extracting", "offered", "pulling")
            self.max_parts_in_flight = max(
                self.max_parts_in_flight, sum(t.progress.value in kinds for t in self.state.tasks.values())
            )

    def counted_devices(self) -> list[list[str]]:
        """Per round the devices that counted."""
        return [[n for n, d in r["devices"].items() if d["progress"] == "folded"] for r in self.state.history]

    def reasons(self, round_: int) -> dict[str, str]:
        """Why devices of a round didn't count."""
        devices: dict[str, Any] = self.state.history[round_ - 1]["devices"]
        return {n: d["reason"] for n, d in devices.items() if d["progress"] != "folded"}


def announced_shell(job: Job, boards: dict[str, Board]) -> Timed:
    """A shell whose devices have announced themselves."""
    shell = Timed(job, boards)
    shell.arrive()
    return shell
