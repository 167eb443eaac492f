"""A shell for asynchronous jobs, and such jobs, for tests of what their coordinator does."""

from dataclasses import replace
from typing import Any

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from support.fakes import coordinator_shell
from support.fakes.coordinator_shell import digest
from support.fakes.tiny_job import JOB, NAMES

RECIPE: dict[str, Any] = {"epochs": 1, "batch_size": 5}


def job_of(
    *, rounds: int = 3, deadline_s: float = 100, devices: int = 3, weighting: str = "samples", **schedule: Any
) -> Job:
    return replace(
        JOB,
        rounds=rounds,
        deadline_s=deadline_s,
        devices=devices,
        strategy="support.fakes.tiny_job:scheduled",
        options={"schedule": {"kind": "asynchronous", **schedule}, "weighting": weighting},
    )


ALL = job_of(arrivals=3)
ONE = job_of(arrivals=1, rounds=9, mixing="damped", rate=0.5, staleness={"decay": "polynomial", "a": 0.5})
TWO = job_of(arrivals=2, rounds=6, max_staleness=2)
WINDOW = job_of(window_s=10, least=2, rounds=5, keep=True, staleness={"decay": "hinge", "a": 0.6, "b": 2})
KINDS = {"all": ALL, "one": ONE, "two": TWO, "window": WINDOW, "few": replace(TWO, options={
    **TWO.options, "schedule": {**TWO.options["schedule"], "arrivals": 1, "concurrent": 2}})}  # fmt: skip


class Shell(coordinator_shell.Shell):
    """A shell for an asynchronous job."""

    def __init__(self, job: Job = ALL) -> None:
        super().__init__(job)
        self.recipe = RECIPE
        self.closes: list[do.Close] = []
        self.acknowledged: dict[tuple[str, int], int] = {}
        self.offered: list[tuple[str, int, int]] = []
        self.log: list[tuple[on.Event, float, list[do.Command]]] = []
        self.sessions = dict.fromkeys(NAMES, 0)

    def come(self, *names: str) -> None:
        for name in names or NAMES:
            self.sessions[name] += 1
            self.feed(on.DeviceBorn(name, self.sessions[name], {"name": "toy"}, 10))

    def arrive(self) -> None:
        self.come()

    def weights(self, command: do.Extract) -> str:
        return digest("offer", command.basis.round, command.basis.model, command.part.widths)

    def update(self, command: do.SendOffer) -> str:
        return digest(command.device, command.offer["weights"]["sha256"])

    def model(self, command: do.Close) -> str:
        return model_digest(command)

    def feed(self, event: on.Event) -> list[do.Command]:
        commands = super().feed(event)
        self.log.append((event, self.now, commands))
        return commands

    def answer(self, command: do.Command) -> on.Event | None:
        match command:
            case do.SendOffer():
                self.offered.append((command.device, command.round, command.attempt))
            case do.Close():
                self.closes.append(command)
            case do.Acknowledge():
                self.acknowledged.setdefault((command.device, command.round), self.state.round)
        return super().answer(command)

    def run(self) -> None:
        for _ in range(10_000):
            if self.inbox:
                self.feed(self.inbox.pop(0))
            elif self.wakes and self.state.phase is not Phase.FINISHED:
                self.tick()
            else:
                return

    def tick(self) -> None:
        at = min(self.wakes)
        self.wakes.remove(at)
        self.now = max(self.now, at)
        self.feed(on.Ticked())

    def until(self, kind: type[Any], device: str = "") -> on.Event:
        """Run until something of this kind is next (of this device), and take it out."""
        while True:
            for event in self.inbox:
                if isinstance(event, kind) and device in ("", getattr(event, "device", "")):
                    self.inbox.remove(event)
                    return event
            self.feed(self.inbox.pop(0))


def model_digest(close: do.Close) -> str:
    """A model that depends on everything that decides one: not on attempts, which are no part of any sum."""
    contributions = [(c.part.device, c.basis.round, c.basis.model, c.weights, c.weight) for c in close.contributions]
    return digest("model", close.model, close.rate, contributions)


def history(shell: Shell) -> list[tuple[int, str]]:
    return [(h["round"], h["model"]) for h in shell.state.history]
