"""The coordinator under every order of events: nothing counts twice, nothing is lost, a crash changes nothing."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.architecture import Activation, Architecture, Axis, ChannelGroup, Layer, Segment, TensorKind, TensorSpec
from fedprune.coordination import Coordinator, Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.errors import ConfigError, StorageError
from fedprune.job import Job

pytestmark = pytest.mark.board

CHANNELS = Axis((Segment(0, 0, 8),))
ARCHITECTURE = Architecture(
    "toy",
    (ChannelGroup("g0", 8),),
    (
        TensorSpec("w", TensorKind.WEIGHT, (CHANNELS, Axis.fixed(4))),
        TensorSpec("head", TensorKind.WEIGHT, (Axis.fixed(3), CHANNELS)),
    ),
    (Layer("w", "Gemm", "w", 1), Layer("head", "Gemm", "head", 1)),
    (Activation("h", CHANNELS, 1, True),),
    (4,),
    3,
)
JOB = Job(name="toy", rounds=3, devices=3, density=0.5, deadline_s=100)
NAMES = ("a", "b", "c")


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Shell:
    """A shell without clock, network or weights: every command is answered as a worker and a fleet would."""

    def __init__(self, job: Job = JOB) -> None:
        self.job = job
        self.now = 0.0
        self.coordinator = Coordinator(job, ARCHITECTURE, State(model="m0"))
        self.inbox: list[on.Event] = []
        self.closes: dict[int, list[do.Close]] = {}
        self.acknowledged: list[tuple[str, int]] = []
        self.cancelled: list[tuple[str, int, str]] = []
        self.wakes: list[float] = []
        self.session = 0

    @property
    def state(self) -> State:
        return self.coordinator.state

    def birth(self, name: str) -> on.DeviceBorn:
        return on.DeviceBorn(name, self.session, {"name": "toy"}, 10)

    def everyone_arrives(self) -> None:
        self.session += 1
        self.inbox += [self.birth(n) for n in NAMES]

    def feed(self, event: on.Event) -> None:
        self.carry_out(self.coordinator.handle(event, self.now))

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
                return on.Extracted(command.round, command.device, command.attempt, {"weights": {"sha256": "0"}})
            case do.SendOffer():
                return on.UpdateAnnounced(
                    command.device,
                    command.round,
                    command.attempt,
                    command.offer["weights"]["sha256"],
                    {"sha256": digest(command.device, command.round)},
                    10,
                    2,
                )
            case do.PullUpdate():
                return on.UpdateStored(command.device, command.round, command.attempt, str(command.weights["sha256"]))
            case do.Fold():
                part = command.contribution
                return on.Folded(part.device, command.round, part.attempt)
            case do.Close():
                self.closes.setdefault(command.round, []).append(command)
                return on.Closed(command.round, digest("model", command.contributions), None, None)
            case do.Evaluate():
                return on.Evaluated(command.round, {"accuracy": 0.5})
            case do.Acknowledge():
                self.acknowledged.append((command.device, command.round))
            case do.Cancel():
                self.cancelled.append((command.device, command.round, command.reason))
            case do.Wake():
                self.wakes.append(command.at)
        return None

    def crash(self) -> None:
        """The shell dies with all it had in flight; a new one loads the state; the devices announce themselves."""
        self.coordinator = Coordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
        self.inbox.clear()
        self.carry_out(self.coordinator.resume(self.now))
        self.everyone_arrives()

    def run(self) -> None:
        steps = 0
        while self.inbox and steps < 10_000:
            self.feed(self.inbox.pop(0))
            steps += 1


def finished_history(shell: Shell) -> list[tuple[int, str]]:
    assert shell.state.phase is Phase.FINISHED
    return [(h["round"], h["model"]) for h in shell.state.history]


def reference() -> list[tuple[int, str]]:
    shell = Shell()
    shell.everyone_arrives()
    shell.run()
    return finished_history(shell)


def test_a_job_runs_its_rounds_with_every_device_once() -> None:
    shell = Shell()
    shell.everyone_arrives()
    shell.run()

    assert [r for r, _ in finished_history(shell)] == [1, 2, 3]
    for closes in shell.closes.values():
        assert [p.device for p in closes[-1].contributions] == list(NAMES)
    assert sorted(shell.acknowledged) == sorted((n, r) for n in NAMES for r in (1, 2, 3))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_order_duplicates_and_crashes_change_nothing(data: st.DataObject) -> None:
    expected = reference()
    shell = Shell()
    shell.everyone_arrives()
    crashes = 0
    for _ in range(400):
        if not shell.inbox:
            break
        action = data.draw(st.sampled_from(["next", "next", "next", "twice", "crash"]))
        event = shell.inbox.pop(data.draw(st.integers(0, len(shell.inbox) - 1)))
        if action == "crash" and crashes < 4:
            crashes += 1
            shell.crash()
            continue
        shell.feed(event)
        if action == "twice":
            shell.feed(event)
    shell.run()

    assert finished_history(shell) == expected


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_state_survives_json_at_every_step(data: st.DataObject) -> None:
    shell = Shell()
    shell.everyone_arrives()
    while shell.inbox:
        shell.feed(shell.inbox.pop(data.draw(st.integers(0, len(shell.inbox) - 1))))
        assert State.from_json(shell.state.to_json()) == shell.state


def test_a_round_closes_at_its_deadline_with_what_is_in() -> None:
    shell = Shell()
    shell.everyone_arrives()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if not (isinstance(event, on.UpdateAnnounced) and event.device == "b"):
            shell.feed(event)
    assert shell.state.phase is Phase.TRAINING
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())

    assert [p.device for p in shell.closes[1][0].contributions] == ["a", "c"]
    assert ("b", 1, "the deadline has passed") in shell.cancelled


def test_an_early_tick_closes_nothing() -> None:
    shell = Shell()
    shell.everyone_arrives()
    for _ in range(4):
        shell.feed(shell.inbox.pop(0))
    shell.now = shell.wakes[-1] - 1
    shell.feed(on.Ticked())

    assert shell.state.phase is Phase.TRAINING
    assert not shell.closes


def test_a_round_without_any_update_is_offered_again() -> None:
    shell = Shell()
    shell.everyone_arrives()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if not isinstance(event, on.UpdateAnnounced):
            shell.feed(event)
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    shell.run()

    assert shell.state.phase is Phase.FINISHED
    assert {t["attempt"] for t in shell.state.history[0]["devices"].values()} == {2}


def test_yesterdays_update_is_declined() -> None:
    shell = Shell()
    shell.everyone_arrives()
    shell.run()
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1] == ("a", 1, "the round is over")


def test_an_update_for_an_earlier_attempt_is_declined() -> None:
    shell = Shell()
    shell.everyone_arrives()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    shell.state.tasks["a"].attempt = 2
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1][:2] == ("a", 1)
    assert "another offer" in shell.cancelled[-1][2]


def test_an_update_of_an_earlier_run_of_the_job_is_declined() -> None:
    shell = Shell()
    shell.everyone_arrives()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    shell.feed(on.UpdateAnnounced("a", 1, 1, "another start", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1][:2] == ("a", 1)


def test_a_rejected_update_does_not_count() -> None:
    shell = Shell()
    shell.everyone_arrives()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.Folded) and event.device == "c" and event.round == 1:
            shell.feed(on.UpdateRejected("c", 1, event.attempt, "not finite"))
        shell.feed(event)

    assert [p.device for p in shell.closes[1][0].contributions] == ["a", "b"]
    assert shell.state.history[0]["devices"]["c"]["reason"] == "not finite"


def test_a_device_that_returns_is_offered_its_round_again() -> None:
    shell = Shell()
    shell.everyone_arrives()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    task = shell.state.tasks["a"]
    commands = shell.coordinator.handle(on.DeviceBorn("a", 9, {"name": "toy"}, 10), 1.0)

    assert do.SendOffer("a", 1, task.attempt, task.offer or {}) in commands


def test_death_of_an_earlier_session_is_ignored() -> None:
    shell = Shell(replace(JOB, devices=4))
    shell.feed(on.DeviceBorn("a", 2, {"name": "toy"}, 10))
    shell.feed(on.DeviceDied("a", 1))
    assert shell.state.devices["a"].online
    shell.feed(on.DeviceDied("a", 2))

    assert not shell.state.devices["a"].online


def test_participation_asks_a_keyed_share() -> None:
    chosen = []
    for _ in range(2):
        shell = Shell(replace(JOB, participation=0.5, rounds=5))
        shell.everyone_arrives()
        shell.run()
        chosen.append([tuple(h["devices"]) for h in shell.state.history])

    assert chosen[0] == chosen[1]
    assert all(len(c) == 2 for c in chosen[0])
    assert len(set(chosen[0])) > 1


def test_a_device_without_a_plan_is_left_out() -> None:
    shell = Shell(replace(JOB, density=0.0, devices=1))
    shell.feed(on.DeviceBorn("a", 1, {"name": "no such thing"}, 10))

    assert shell.state.devices["a"].excluded
    assert shell.state.phase is Phase.WAITING


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "fedprune.state/0"}', '{"format": "fedprune.state/1"}'])
def test_a_damaged_state_is_one_clear_error(text: str) -> None:
    with pytest.raises(StorageError):
        State.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 0),
        ("rounds", 2.5),
        ("density", float("nan")),
        ("scorer", "best"),
        ("name", "a/b"),
        ("recipe", 3),
        ("x", 1),
    ],
)
def test_a_bad_setting_names_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        Job.from_dict({key: value})


def test_a_job_survives_its_dict() -> None:
    assert Job.from_dict(JOB.to_dict()) == JOB
