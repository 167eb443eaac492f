"""Synchronous rounds in bad weather: whatever is lost, doubled, late or out of order, every round ends, and every
update counts once or not at all.
"""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedprune.coordination import Phase, State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from support.fakes.coordinator_shell import Shell, digest
from support.fakes.tiny_job import ARCHITECTURE, JOB

pytestmark = pytest.mark.board

NAMES = tuple("abcdef")
MUTE = NAMES[-1]
"""A device that never answers an offer."""

POSITION_LISTS = st.lists(st.integers(0, 99), min_size=1, max_size=8)
JOBS = [
    replace(JOB, devices=2, rounds=4),
    replace(JOB, devices=3, rounds=4, participation=0.5, over_selection=0.5),
    replace(JOB, devices=3, rounds=4, in_flight=2),
    replace(JOB, devices=2, rounds=4, participation=0.6, over_selection=1.0, in_flight=2),
]


class Answers(Shell):
    """What a worker and devices answer."""

    def arrive(self) -> None:
        """They come as the weather lets them."""

    def weights(self, command: do.Extract) -> str:
        return digest(command.basis.model)

    def update(self, command: do.SendOffer) -> str:
        return digest(command.device, command.round, command.offer["weights"]["sha256"])

    def model(self, command: do.Close) -> str:
        return digest("model", command.contributions)


class Weather(RuleBasedStateMachine):
    """Every message may be lost, doubled and overtaken; devices vanish, forget and return with yesterday's update.

    The ledgers are the shell's own: what it was told to acknowledge, what was folded, and what each model is made of.
    """

    @initialize(job=st.sampled_from(JOBS))
    def begin(self, job: Job) -> None:
        self.job, self.now = job, 0.0
        self.shell = Answers(job)
        self.work: list[on.Event] = []  # the executor's answers, which are never lost
        self.air: list[on.Event] = []  # what devices say
        self.old: list[on.Event] = []  # all that devices ever said
        self.online_sessions: dict[str, int] = {}
        self.sessions = dict.fromkeys(NAMES, 0)
        self.updates: dict[str, on.UpdateAnnounced] = {}
        self.acknowledged: set[tuple[str, int, int, str]] = set()
        self.folded: set[tuple[str, int, int]] = set()
        self.closed: dict[int, tuple[do.Contribution, ...]] = {}
        self.crashes = 0
        for name in NAMES[2:]:
            self.born(name)

    @property
    def state(self) -> State:
        return self.shell.state

    def feed(self, event: on.Event) -> None:
        self.carry_out(self.shell.coordinator.handle(event, self.now))

    def carry_out(self, commands: list[do.Command]) -> None:
        for command in commands:
            answer = self.shell.answer(command)
            match command:
                case do.SendOffer() if isinstance(answer, on.UpdateAnnounced):
                    if command.device in self.online_sessions and command.device != MUTE:
                        self.updates[command.device] = answer
                        self.air.append(answer)
                        self.old.append(answer)
                case do.PullUpdate() if answer is not None:
                    if command.device in self.online_sessions:
                        self.air.append(answer)
                case do.Acknowledge():
                    self.acknowledged.add((command.device, command.round, command.attempt, command.weights))
                    self.updates.pop(command.device, None)
                case do.Cancel():
                    update = self.updates.get(command.device)
                    if update is not None and (update.round, update.attempt) == (command.round, command.attempt):
                        del self.updates[command.device]
                case _ if answer is not None:
                    self.work.append(answer)
            if isinstance(command, do.Close):
                self.closed[command.round] = command.contributions

    # Weather.

    @rule(positions=POSITION_LISTS, how=st.sampled_from(["once", "once", "twice", "lost"]))
    @precondition(lambda self: self.air)
    def say(self, positions: list[int], how: str) -> None:
        for at in positions[: len(self.air)]:
            event = self.air.pop(at % len(self.air))
            for _ in range({"lost": 0, "once": 1, "twice": 2}[how]):
                self.feed(event)

    @rule(positions=POSITION_LISTS, twice=st.booleans())
    @precondition(lambda self: self.work)
    def answer(self, positions: list[int], twice: bool) -> None:
        for at in positions:
            if not self.work:
                return
            event = self.work.pop(at % len(self.work))
            for _ in range(1 + twice):
                if isinstance(event, on.Folded) and self.awaited(event):
                    self.folded.add((event.device, event.round, event.attempt))
                self.feed(event)

    def awaited(self, event: on.Folded) -> bool:
        task = self.state.tasks.get(event.device)
        here = (self.state.phase, self.state.round) == (Phase.TRAINING, event.round)
        return here and task is not None and (task.attempt, task.progress) == (event.attempt, Progress.STORED)

    @rule(order=st.lists(st.integers(0, 99), min_size=8, max_size=40))
    @precondition(lambda self: self.work or self.air)
    def resume(self, order: list[int]) -> None:
        """A fair spell: nothing is lost, but anything may overtake."""
        for at in order:
            if self.work and (at % 2 or not self.air):
                self.answer([at // 2], False)
            elif self.air:
                self.say([at // 2], "once")

    @rule(names=st.sets(st.sampled_from(NAMES), min_size=1), forgets=st.booleans(), twice=st.booleans())
    def come(self, names: set[str], forgets: bool, twice: bool) -> None:
        for name in sorted(names):
            self.born(name, forgets=forgets and len(names) == 1, twice=twice)

    def born(self, name: str, *, forgets: bool = False, twice: bool = False) -> None:
        """It says again what it holds, as a board does, whenever that was trained."""
        self.sessions[name] = 1 if forgets else self.sessions[name] + 1
        self.online_sessions[name] = self.sessions[name]
        for _ in range(1 + twice):
            self.feed(on.DeviceBorn(name, self.sessions[name], {"name": "toy"}, 10))
        if forgets:
            self.updates.pop(name, None)
        elif name in self.updates:
            self.air.append(self.updates[name])

    @rule(name=st.sampled_from(NAMES), earlier=st.booleans())
    def vanish(self, name: str, earlier: bool) -> None:
        if name in self.online_sessions:
            self.feed(on.DeviceDied(name, self.online_sessions[name] - earlier))
            if not earlier:
                del self.online_sessions[name]

    @rule(at=st.integers(0, 999))
    @precondition(lambda self: self.old)
    def say_again(self, at: int) -> None:
        """Something that was said long ago comes once more."""
        self.feed(self.old[at % len(self.old)])

    @rule(name=st.sampled_from(NAMES), refused=st.booleans())
    def fail(self, name: str, refused: bool) -> None:
        task = self.state.tasks.get(name)
        if task is not None and task.progress is (Progress.OFFERED if refused else Progress.PULLING):
            kind = on.OfferRefused if refused else on.UpdateRejected
            self.feed(kind(name, self.state.round, task.attempt, "no room"))

    @rule(seconds=st.sampled_from([1.0, 6.0, 60.0, 110.0, -30.0]))
    def pass_time(self, seconds: float) -> None:
        self.now = max(0.0, self.now + seconds)
        self.feed(on.Ticked())

    @rule()
    @precondition(lambda self: self.crashes < 2)
    def crash(self) -> None:
        self.crashes += 1
        coordinator = make_coordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
        self.work.clear()
        self.air.clear()
        self.shell.wakes.clear()
        self.shell.coordinator = coordinator
        self.carry_out(coordinator.resume(self.now))

    # What always holds.

    @invariant()
    def nothing_counts_twice(self) -> None:
        for number, contributions in getattr(self, "closed", {}).items():
            names = [p.part.device for p in contributions]
            assert names == sorted(set(names))
            for contribution in contributions:
                assert contribution.basis.round == number
                assert (
                    contribution.part.device,
                    number,
                    contribution.part.attempt,
                    contribution.weights,
                ) in self.acknowledged
                assert (contribution.part.device, number, contribution.part.attempt) in self.folded

    @invariant()
    def what_is_folded_and_acknowledged_counts(self) -> None:
        """All that was acknowledged was folded and is in its round's model, and nothing else is."""
        for row in self.state.history if hasattr(self, "job") else []:
            counted = {(p.part.device, p.part.attempt) for p in self.closed[row["round"]]}
            assert counted == {(n, d["attempt"]) for n, d in row["devices"].items() if d["progress"] == "folded"}
            assert {(n, a) for n, r, a in self.folded if r == row["round"]} == counted
            assert {(n, a) for n, r, a, _ in self.acknowledged if r == row["round"]} == counted

    @invariant()
    def few_work_at_a_time(self) -> None:
        if hasattr(self, "job") and self.job.in_flight and self.state.phase is Phase.TRAINING:
            working = (Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)
            assert sum(t.progress in working for t in self.state.tasks.values()) <= self.job.in_flight

    @invariant()
    def the_state_is_what_is_saved(self) -> None:
        if hasattr(self, "job"):
            assert State.from_json(self.state.to_json()) == self.state

    def teardown(self) -> None:
        """The sun comes out: with devices that stay, every round ends within its time."""
        if not hasattr(self, "job"):
            return
        self.shell.wakes.append(self.now)
        limit = self.now + (2 * self.job.rounds + 2) * (len(NAMES) + 1) * self.job.deadline_s
        for _ in range(20_000):
            if self.state.phase is Phase.FINISHED:
                break
            for name in NAMES:
                if (
                    name not in self.online_sessions
                    or not self.state.devices[name].online
                    or self.state.devices[name].excluded
                ):
                    self.born(name)
            if self.work:
                self.answer([0], False)
            elif self.air:
                self.say([0], "once")
            elif self.updates and (stuck := self.unheard()):
                self.air += stuck
            else:
                assert self.now < limit
                due = [at for at in self.shell.wakes if at > self.now]
                assert due, f"nobody will ever look again: {self.state.phase}"
                self.now = min(due)
                self.shell.wakes = due[1:] if due[0] == self.now else [at for at in due if at != self.now]
                self.feed(on.Ticked())
        assert self.state.phase is Phase.FINISHED
        assert [h["round"] for h in self.state.history] == list(range(1, self.job.rounds + 1))
        self.nothing_counts_twice()
        self.what_is_folded_and_acknowledged_counts()

    def unheard(self) -> list[on.Event]:
        """Updates that a device still holds, and says again."""
        awaited = (Progress.OFFERED, Progress.PULLING)
        awaited_attempts = {
            n: (self.state.round, t.attempt) for n, t in self.state.tasks.items() if t.progress in awaited
        }
        return [u for n, u in self.updates.items() if awaited_attempts.get(n) == (u.round, u.attempt)]


Weather.TestCase.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
TestWeather = Weather.TestCase
