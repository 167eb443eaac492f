"""A shell round a coordinator, for a synchronous job that a test feeds by hand."""

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from support.fakes import coordinator_shell
from support.fakes.coordinator_shell import digest
from support.fakes.tiny_job import JOB, NAMES


class Shell(coordinator_shell.Shell):
    """A shell for a synchronous job."""

    def __init__(self, job: Job = JOB) -> None:
        super().__init__(job)
        self.closes: dict[int, list[do.Close]] = {}
        self.acknowledged: list[tuple[str, int]] = []
        self.told: list[str] = []
        self.session = 0

    def birth_event(self, name: str) -> on.DeviceBorn:
        return on.DeviceBorn(name, self.session, {"name": "toy"}, 10)

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [self.birth_event(n) for n in NAMES]

    def update(self, command: do.SendOffer) -> str:
        return digest(command.device, command.round)

    def model(self, command: do.Close) -> str:
        return digest("model", command.contributions)

    def answer(self, command: do.Command) -> on.Event | None:
        match command:
            case do.Close():
                self.closes.setdefault(command.round, []).append(command)
            case do.Acknowledge():
                self.acknowledged.append((command.device, command.round))
            case do.TellFinished():
                self.told.append(command.device)
        return super().answer(command)

    def run(self) -> None:
        steps = 0
        while self.inbox and steps < 10_000:
            self.feed(self.inbox.pop(0))
            steps += 1
