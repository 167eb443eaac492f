"""A shell for asynchronous jobs without clock, network or weights, for tests of what their coordinator does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from fedprune.coordination import Phase, State, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.job import Job
from toy import ARCHITECTURE, JOB, NAMES

RECIPE = {"epochs": 1, "batch_size": 5}


def job_of(
    *, rounds: int = 3, deadline_s: float = 100, devices: int = 3, weighting: str = "samples", **schedule: Any
) -> Job:
    body = {"kind": "asynchronous", **schedule}
    options = {"schedule": body, "weighting": weighting}
    return replace(
        JOB, rounds=rounds, deadline_s=deadline_s, devices=devices, strategy="toy:scheduled", options=options
    )


ALL = job_of(arrivals=3)
ONE = job_of(arrivals=1, rounds=9, mixing="damped", rate=0.5, staleness={"decay": "polynomial", "a": 0.5})
TWO = job_of(arrivals=2, rounds=6, max_staleness=2)
WINDOW = job_of(window_s=10, least=2, rounds=5, keep=True, staleness={"decay": "hinge", "a": 0.6, "b": 2})
KINDS = {"all": ALL, "one": ONE, "two": TWO, "window": WINDOW, "few": replace(TWO, options={
    **TWO.options, "schedule": {**TWO.options["schedule"], "arrivals": 1, "concurrent": 2}})}  # fmt: skip


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Shell:
    """A shell without clock, network or weights: every command is answered as a worker and a fleet would."""

    def __init__(self, job: Job = ALL) -> None:
        self.job = job
        self.now = 0.0
        self.coordinator = coordinate(job, ARCHITECTURE, State(model="m0"))
        self.inbox: list[on.Event] = []
        self.closes: list[do.Close] = []
        self.acknowledged: dict[tuple[str, int], int] = {}
        self.cancelled: list[tuple[str, int, str]] = []
        self.offered: list[tuple[str, int, int]] = []
        self.wakes: list[float] = []
        self.log: list[tuple[on.Event, float, list[do.Command]]] = []
        self.sessions = dict.fromkeys(NAMES, 0)

    @property
    def state(self) -> State:
        return self.coordinator.state

    def come(self, *names: str) -> None:
        for name in names or NAMES:
            self.sessions[name] += 1
            self.feed(on.DeviceBorn(name, self.sessions[name], {"name": "toy"}, 10))

    def feed(self, event: on.Event) -> None:
        commands = self.coordinator.handle(event, self.now)
        self.log.append((event, self.now, commands))
        self.carry_out(commands)

    def carry_out(self, commands: list[do.Command]) -> None:
        for command in commands:
            answer = self.answer(command)
            if answer is not None:
                self.inbox.append(answer)

    def answer(self, command: do.Command) -> on.Event | None:
        match command:
            case do.Score():
                return on.Scored(command.round, digest("ranking", command.round))
            case do.Extract():
                basis, part = command.basis, command.part
                offer = {
                    "weights": {"sha256": digest("offer", basis.round, basis.model, part.widths)},
                    "widths": list(part.widths),
                    "recipe": RECIPE,
                }
                return on.Extracted(basis.round, part.device, part.attempt, offer)
            case do.SendOffer():
                self.offered.append((command.device, command.round, command.attempt))
                return on.UpdateAnnounced(
                    command.device,
                    command.round,
                    command.attempt,
                    command.offer["weights"]["sha256"],
                    {"sha256": digest(command.device, command.offer["weights"]["sha256"])},
                    10,
                    2,
                )
            case do.PullUpdate():
                return on.UpdateStored(command.device, command.round, command.attempt, str(command.weights["sha256"]))
            case do.Fold():
                found = command.contribution
                return on.Folded(found.part.device, found.basis.round, found.part.attempt)
            case do.Close():
                self.closes.append(command)
                return on.Closed(command.round, summed(command))
            case do.Evaluate():
                return on.Evaluated(command.round, {"accuracy": 0.5})
            case do.Acknowledge():
                self.acknowledged.setdefault((command.device, command.round), self.state.round)
            case do.Cancel():
                self.cancelled.append((command.device, command.round, command.reason))
            case do.Wake():
                self.wakes.append(command.at)
        return None

    def crash(self) -> None:
        """The shell dies with all it had in flight; a new one loads the state; the devices announce themselves."""
        self.coordinator = coordinate(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
        self.inbox.clear()
        self.wakes.clear()
        self.carry_out(self.coordinator.resume(self.now))
        self.come()

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

    def run_silently(self) -> None:
        """Run while no device says that it has an update."""
        while self.inbox:
            event = self.inbox.pop(0)
            if not isinstance(event, on.UpdateAnnounced):
                self.feed(event)

    def until(self, kind: type[Any], device: str = "") -> on.Event:
        """Run until something of this kind is next (of this device), and take it out."""
        while True:
            for event in self.inbox:
                if isinstance(event, kind) and device in ("", getattr(event, "device", "")):
                    self.inbox.remove(event)
                    return event
            self.feed(self.inbox.pop(0))


def summed(close: do.Close) -> str:
    """A model that depends on everything that decides one: not on attempts, which are no part of any sum."""
    parts = [(c.part.device, c.basis.round, c.basis.model, c.weights, c.weight) for c in close.contributions]
    return digest("model", close.model, close.rate, parts)


def history(shell: Shell) -> list[tuple[int, str]]:
    return [(h["round"], h["model"]) for h in shell.state.history]
