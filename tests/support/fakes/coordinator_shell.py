"""A shell without clock, network or weights, for tests of what coordinators do."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import Range
from fedprune.coordination import State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.secure_aggregation.vector_form import SECURE_FIELD, MaskedForm, TensorGrid, VectorForm
from support.fakes.tiny_job import ARCHITECTURE


def digest(*inputs: object) -> str:
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


class Shell(ABC):
    """Every command is answered as a worker and a fleet would; answers wait in the inbox."""

    def __init__(self, job: Job) -> None:
        self.job = job = replace(job, ignores_plans=True)  # the boards of these fleets have no profiles
        self.recipe = job.recipe.to_offer()
        self.now = 0.0
        self.coordinator = make_coordinator(job, ARCHITECTURE, State(model="m0"))
        self.inbox: list[on.Event] = []
        self.cancellations: list[tuple[str, int, str]] = []
        self.wakes: list[float] = []

    @property
    def state(self) -> State:
        return self.coordinator.state

    @abstractmethod
    def arrive(self) -> None:
        """Every device announces itself, with a new session."""

    def weights(self, command: do.Extract) -> str:
        """Digest of the weights of an offer."""
        return "0"

    def update(self, command: do.SendOffer) -> str:
        """Digest of the update that answers an offer."""
        return command.device

    def model(self, command: do.Close) -> str:
        """Digest of the model that a round ends with."""
        return f"m{command.round}"

    def feed(self, event: on.Event) -> list[do.Command]:
        """Let something happen, and carry out what the coordinator says."""
        commands = self.coordinator.handle(event, self.now)
        self.carry_out(commands)
        return commands

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
                device_part = command.part
                offer: dict[str, Any] = {
                    "weights": {"sha256": self.weights(command)},
                    "widths": list(device_part.widths),
                    "recipe": self.recipe,
                }
                return on.Extracted(command.basis.round, device_part.device, device_part.attempt, offer)
            case do.SendOffer():
                return on.UpdateAnnounced(
                    command.device,
                    command.round,
                    command.attempt,
                    command.offer["weights"]["sha256"],
                    {"sha256": self.update(command)},
                    10,
                    2,
                )
            case do.PullUpdate():
                return on.UpdateStored(command.device, command.round, command.attempt, str(command.weights["sha256"]))
            case do.FoldUpdate():
                contribution = command.contribution
                return on.Folded(contribution.part.device, contribution.basis.round, contribution.part.attempt)
            case do.Close():
                return on.Closed(command.round, self.model(command))
            case do.Evaluate():
                return on.Evaluated(command.round, {"accuracy": 0.5})
            case do.Cancel():
                self.cancellations.append((command.device, command.round, command.reason))
            case do.WakeAt():
                self.wakes.append(command.at)
        return None

    def crash(self) -> None:
        """The shell dies with all it had in flight; a new one loads the state; the devices announce themselves."""
        self.coordinator = make_coordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
        self.inbox.clear()
        self.wakes.clear()
        self.carry_out(self.coordinator.resume(self.now))
        self.arrive()

    def feed_in_any_order(self, data: st.DataObject) -> None:
        """Feed what waits in a drawn order, some of it twice, with up to four crashes."""
        crashes = 0
        for _ in range(400):
            if not self.inbox:
                return
            action = data.draw(st.sampled_from(["next", "next", "next", "twice", "crash"]))
            event = self.inbox.pop(data.draw(st.integers(0, len(self.inbox) - 1)))
            if action == "crash" and crashes < 4:
                crashes += 1
                self.crash()
                continue
            for _ in range(2 if action == "twice" else 1):
                self.feed(event)

    def run_silently(self) -> None:
        """Run while no device says that it has an update."""
        while self.inbox:
            event = self.inbox.pop(0)
            if not isinstance(event, on.UpdateAnnounced):
                self.feed(event)


class MaskingShell(Shell):
    """A shell whose boards mask their updates where the job says so."""

    FORM = MaskedForm(VectorForm({"w": TensorGrid(Range(0))}), narrow=0, wide=1).to_json()

    def answer(self, command: do.Command) -> on.Event | None:
        event = super().answer(command)
        if self.job.secure_aggregation and isinstance(event, on.Extracted):
            return replace(event, offer=event.offer | {"selection": "s", SECURE_FIELD: self.FORM})
        if self.job.secure_aggregation and isinstance(event, on.UpdateAnnounced):
            return replace(event, weights={})
        return event
