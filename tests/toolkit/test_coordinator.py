"""The coordinator under every order of events: nothing counts twice, nothing is lost, a crash changes nothing."""

from __future__ import annotations

from dataclasses import replace

import coordinator_shell
import pytest
from coordinator_shell import digest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune import profile_store
from fedprune.coordination import Coordinator, Phase, State, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress, Task
from fedprune.errors import ConfigError, StorageError
from fedprune.job import Job
from fedprune.latency import typical_table
from fedprune.prediction import predict
from fedprune.probe_report import ProbeReport
from toy import ARCHITECTURE, JOB, NAMES

pytestmark = pytest.mark.board


class Shell(coordinator_shell.Shell):
    """A shell for a synchronous job."""

    def __init__(self, job: Job = JOB) -> None:
        super().__init__(job)
        self.closes: dict[int, list[do.Close]] = {}
        self.acknowledged: list[tuple[str, int]] = []
        self.told: list[str] = []
        self.session = 0

    def birth(self, name: str) -> on.DeviceBorn:
        return on.DeviceBorn(name, self.session, {"name": "toy"}, 10)

    def arrive(self) -> None:
        self.session += 1
        self.inbox += [self.birth(n) for n in NAMES]

    def weights(self, command: do.Extract) -> str:
        return "0"

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


def finished_history(shell: Shell) -> list[tuple[int, str]]:
    assert shell.state.phase is Phase.FINISHED
    return [(h["round"], h["model"]) for h in shell.state.history]


def reference() -> list[tuple[int, str]]:
    shell = Shell()
    shell.arrive()
    shell.run()
    return finished_history(shell)


def test_a_job_runs_its_rounds_with_every_device_once() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()

    assert [r for r, _ in finished_history(shell)] == [1, 2, 3]
    for closes in shell.closes.values():
        assert [p.part.device for p in closes[-1].contributions] == list(NAMES)
    assert sorted(shell.acknowledged) == sorted((n, r) for n in NAMES for r in (1, 2, 3))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_order_duplicates_and_crashes_change_nothing(data: st.DataObject) -> None:
    expected = reference()
    shell = Shell()
    shell.arrive()
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
    shell.arrive()
    while shell.inbox:
        shell.feed(shell.inbox.pop(data.draw(st.integers(0, len(shell.inbox) - 1))))
        assert State.from_json(shell.state.to_json()) == shell.state


class Weather(Shell):
    """A shell whose devices die, return, refuse, lose their memory and are late."""

    def __init__(self, data: st.DataObject) -> None:
        super().__init__(replace(JOB, devices=2))
        self.data = data
        self.gone: set[str] = set()
        self.sessions = dict.fromkeys(NAMES, 0)

    def answer(self, command: do.Command) -> on.Event | None:
        if isinstance(command, (do.SendOffer, do.PullUpdate)) and command.device in self.gone:
            return None
        return super().answer(command)

    def come(self, name: str, *, forgetful: bool = False) -> None:
        self.gone.discard(name)
        self.sessions[name] = 1 if forgetful else self.sessions[name] + 1
        self.feed(on.DeviceBorn(name, self.sessions[name], {"name": "toy"}, 10))

    def go(self, name: str) -> None:
        self.gone.add(name)
        self.feed(on.DeviceDied(name, self.sessions[name]))

    def act(self) -> None:
        action = self.data.draw(
            st.sampled_from(
                ["next", "next", "next", "twice", "lose", "tick", "die", "come", "forget", "refuse", "reject", "crash"]
            )
        )
        name = self.data.draw(st.sampled_from(NAMES))
        task = self.state.tasks.get(name)
        if action in ("next", "twice", "lose") and self.inbox:
            event = self.inbox.pop(self.data.draw(st.integers(0, len(self.inbox) - 1)))
            # Workers don't lose their answers; what comes from devices may be lost.
            if action == "lose" and isinstance(event, (on.UpdateAnnounced, on.UpdateStored)):
                return
            self.feed(event)
            if action == "twice":
                self.feed(event)
        elif action == "tick":
            self.now += self.job.deadline_s * self.data.draw(st.sampled_from([0.4, 1.1]))
            self.feed(on.Ticked())
        elif action == "die":
            self.go(name)
        elif action in ("come", "forget"):
            self.come(name, forgetful=action == "forget")
        elif action == "refuse" and task is not None:
            self.feed(on.OfferRefused(name, self.state.round, task.attempt, "no room"))
        elif action == "reject" and task is not None:
            self.feed(on.UpdateRejected(name, self.state.round, task.attempt, "not finite"))
        elif action == "crash":
            self.coordinator = Coordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
            self.inbox.clear()
            self.carry_out(self.coordinator.resume(self.now))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_job_ends_whatever_the_weather_was(data: st.DataObject) -> None:
    shell = Weather(data)
    for name in NAMES:
        shell.come(name)
    for _ in range(60):
        shell.act()
    for _ in range(60):  # the sun comes out
        for name in NAMES:
            shell.come(name)
        shell.run()
        if shell.state.phase is Phase.FINISHED:
            break
        shell.now += shell.job.deadline_s + 1
        shell.feed(on.Ticked())

    assert shell.state.phase is Phase.FINISHED
    assert [h["round"] for h in shell.state.history] == [1, 2, 3]
    for closes in shell.closes.values():
        parts = closes[-1].contributions
        assert parts
        assert len({p.part.device for p in parts}) == len(parts)
        assert all(p.weights and p.weight == 10 for p in parts)


def test_a_round_closes_at_its_deadline_with_what_is_in() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if not (isinstance(event, on.UpdateAnnounced) and event.device == "b"):
            shell.feed(event)
    assert shell.state.phase is Phase.TRAINING
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())

    assert [p.part.device for p in shell.closes[1][0].contributions] == ["a", "c"]
    assert ("b", 1, "the deadline has passed") in shell.cancelled


def test_an_early_tick_closes_nothing() -> None:
    shell = Shell()
    shell.arrive()
    while not shell.wakes:
        shell.feed(shell.inbox.pop(0))
    shell.now = shell.wakes[-1] - 1
    shell.feed(on.Ticked())

    assert shell.state.phase is Phase.TRAINING
    assert not shell.closes
    assert shell.wakes[-1] == shell.state.deadline


def test_the_deadline_counts_from_the_last_offer() -> None:
    shell = Shell()
    shell.arrive()
    while not any(isinstance(e, on.Extracted) for e in shell.inbox):
        shell.feed(shell.inbox.pop(0))
    for at, event in ((5.0, shell.inbox.pop(0)), (6.0, shell.inbox.pop(0))):
        shell.now = at
        shell.feed(event)
    assert shell.state.deadline is None
    shell.now = 7.0
    shell.feed(shell.inbox.pop(0))

    assert shell.state.deadline == 7.0 + JOB.deadline_s


def test_an_update_on_the_disk_counts_though_the_deadline_passes_before_it_is_folded() -> None:
    shell = Shell()
    shell.arrive()
    held = []
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.Folded):
            held.append(event)
        elif not (isinstance(event, on.UpdateAnnounced) and event.device == "c"):
            shell.feed(event)
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    assert not shell.closes
    for event in held:
        shell.feed(event)

    assert [p.part.device for p in shell.closes[1][0].contributions] == ["a", "b"]


def test_a_round_that_nobody_finished_goes_to_whoever_is_there() -> None:
    shell = Shell(replace(JOB, devices=1, participation=0.3))
    shell.feed(shell.birth("a"))
    while not isinstance(shell.inbox[0], on.UpdateAnnounced):
        shell.feed(shell.inbox.pop(0))
    shell.inbox.clear()
    shell.feed(on.DeviceDied("a", 0))
    shell.feed(shell.birth("b"))
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    shell.run()

    assert shell.state.phase is Phase.FINISHED
    assert set(shell.state.history[0]["devices"]) == {"b"}


def test_a_round_is_not_offered_to_the_same_silent_device_for_ever() -> None:
    shell = Shell(replace(JOB, devices=1, participation=0.1))
    for name in (names := [f"d{i}" for i in range(10)]):
        shell.feed(shell.birth(name))
    asked = []
    for _ in range(30):
        shell.run_silently()
        asked += shell.state.tasks
        shell.now = shell.wakes[-1]
        shell.feed(on.Ticked())
    assert len(asked) == 30
    assert len(set(asked)) >= len(names) / 2


def test_a_round_that_starts_anew_with_others_is_ranked_for_them() -> None:
    shell = Shell(replace(JOB, devices=1))
    shell.feed(shell.birth("a"))
    shell.run_silently()
    shell.feed(on.DeviceDied("a", 0))
    shell.feed(shell.birth("b"))
    shell.now = shell.wakes[-1]
    again = shell.feed(on.Ticked())
    assert [c.participants for c in again if isinstance(c, do.Score)] == [("b",)]
    shell.run()
    assert {t["attempt"] for t in shell.state.history[0]["devices"].values()} == {2}


def test_a_round_that_starts_anew_with_the_same_devices_keeps_its_ranking() -> None:
    shell = Shell()
    shell.arrive()
    shell.run_silently()
    ranking, shell.now = shell.state.ranking, shell.wakes[-1]
    again = shell.feed(on.Ticked())
    assert not any(isinstance(c, do.Score) for c in again)
    assert shell.state.ranking == ranking


def test_a_finished_job_goes_on_with_more_rounds_and_only_then() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.crash()
    assert shell.state.phase is Phase.FINISHED
    shell.job = replace(JOB, rounds=JOB.rounds + 2)
    shell.crash()
    shell.run()
    assert [r for r, _ in finished_history(shell)] == list(range(1, JOB.rounds + 3))


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_job_that_its_allocator_ended_stays_finished(synchronous: bool) -> None:
    job = Job(rounds=100, strategy="pr-fl", options={"synchronous": synchronous})
    state = State(model="m7", phase=Phase.FINISHED, round=7, allocation={"done": True})
    commands = coordinate(job, ARCHITECTURE, state).resume(0.0)
    assert [c for c in commands if not isinstance(c, do.Wake)] == [do.Finish("m7")]
    assert state.phase is Phase.FINISHED


def test_a_round_that_nobody_is_left_for_waits() -> None:
    shell = Shell()
    shell.arrive()
    shell.run_silently()
    for name in NAMES:
        shell.feed(on.DeviceDied(name, 1))
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    assert shell.state.phase is Phase.WAITING
    shell.arrive()
    shell.run()

    assert [h["round"] for h in shell.state.history] == [1, 2, 3]


def test_new_settings_hold_after_a_restart() -> None:
    shell = Shell(replace(JOB, density=1.0))
    shell.arrive()
    shell.feed(shell.inbox.pop(0))
    shell.coordinator = Coordinator(replace(JOB, density=0.25), ARCHITECTURE, State.from_json(shell.state.to_json()))
    shell.coordinator.resume(0.0)

    assert shell.state.devices["a"].widths == (2,)


def test_weights_never_sum_to_more_than_sums_hold() -> None:
    shell = Shell()
    shell.inbox = [on.DeviceBorn(n, 1, {"name": "toy"}, s) for n, s in zip(NAMES, (2**24, 2**23, 1), strict=True)]
    shell.run()
    weights = [p.weight for p in shell.closes[1][0].contributions]

    assert sum(weights) <= 2**24
    assert weights[0] / weights[1] == pytest.approx(2, rel=1e-4)
    assert weights[2] >= 1


def test_an_update_cannot_say_what_it_counts_for() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.UpdateAnnounced) and event.device == "a":
            event = replace(event, samples=10**9, steps=10**9)
        shell.feed(event)

    assert {p.weight for p in shell.closes[1][0].contributions} == {10}
    assert max(p.steps for p in shell.closes[1][0].contributions) <= JOB.recipe.steps(10)


def test_only_the_one_who_comes_late_is_told_that_it_is_over() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.feed(on.DeviceBorn("b", 9, {"name": "toy"}, 10))

    assert shell.told == ["b"]


def test_a_device_that_forgot_how_often_it_came_is_let_in() -> None:
    shell = Shell(replace(JOB, devices=4))
    shell.feed(on.DeviceBorn("a", 17, {"name": "toy"}, 10))
    shell.feed(on.DeviceBorn("a", 1, {"name": "toy"}, 10))
    assert shell.state.devices["a"].session == 17
    shell.feed(on.DeviceDied("a", 17))
    shell.feed(on.DeviceBorn("a", 1, {"name": "toy"}, 10))

    assert shell.state.devices["a"].online
    assert shell.state.devices["a"].session == 1


def test_a_round_without_any_update_is_offered_again() -> None:
    shell = Shell()
    shell.arrive()
    shell.run_silently()
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    shell.run()

    assert shell.state.phase is Phase.FINISHED
    assert {t["attempt"] for t in shell.state.history[0]["devices"].values()} == {2}


def test_who_is_late_and_asked_once_more_is_not_cancelled() -> None:
    shell = Shell()
    shell.arrive()
    shell.run_silently()
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))  # it was ready a moment too late

    assert {t.attempt for t in shell.state.tasks.values()} == {2}
    assert shell.cancelled == []


def test_who_is_late_and_not_asked_once_more_is_cancelled() -> None:
    shell = Shell(replace(JOB, devices=2))
    shell.arrive()
    shell.run_silently()
    shell.feed(on.DeviceDied("b", shell.session))
    shell.now = shell.wakes[-1]
    shell.feed(on.Ticked())

    assert set(shell.state.tasks) == {"a", "c"}
    assert [n for n, _, _ in shell.cancelled] == ["b"]


def test_yesterdays_update_is_declined() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1] == ("a", 1, "the round is over")


def test_an_update_for_an_earlier_attempt_is_declined() -> None:
    shell = Shell()
    shell.arrive()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    shell.state.tasks["a"].attempt = 2
    shell.feed(on.UpdateAnnounced("a", 1, 1, "0", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1][:2] == ("a", 1)
    assert "another offer" in shell.cancelled[-1][2]


def test_an_update_of_an_earlier_run_of_the_job_is_declined() -> None:
    shell = Shell()
    shell.arrive()
    for _ in range(7):
        shell.feed(shell.inbox.pop(0))
    shell.feed(on.UpdateAnnounced("a", 1, 1, "another start", {"sha256": "x"}, 10, 2))

    assert shell.cancelled[-1][:2] == ("a", 1)


def test_a_rejected_update_does_not_count() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.Folded) and event.device == "c" and event.round == 1:
            shell.feed(on.UpdateRejected("c", 1, event.attempt, "not finite"))
        shell.feed(event)

    assert [p.part.device for p in shell.closes[1][0].contributions] == ["a", "b"]
    assert shell.state.history[0]["devices"]["c"]["reason"] == "not finite"


def test_a_device_that_keeps_refusing_is_left_out_until_it_connects_again() -> None:
    shell = Shell(replace(JOB, rounds=6, devices=2))
    shell.arrive()
    asked = []
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.UpdateAnnounced) and event.device == "c":
            asked.append(event.round)
            event = on.OfferRefused("c", event.round, event.attempt, "label 7 is out of range")
        shell.feed(event)
    assert asked == [2, 3, 4]  # the first round began before it was there
    assert "label 7" in shell.state.devices["c"].excluded
    shell.feed(on.DeviceBorn("c", 9, {"name": "toy"}, 10))

    assert not shell.state.devices["c"].excluded
    assert shell.state.devices["c"].widths


def test_a_device_that_refuses_now_and_then_stays() -> None:
    shell = Shell(replace(JOB, rounds=8, devices=2))
    shell.arrive()
    while shell.inbox:
        event = shell.inbox.pop(0)
        if isinstance(event, on.UpdateAnnounced) and event.device == "c" and event.round % 3:
            event = on.OfferRefused("c", event.round, event.attempt, "no room")
        shell.feed(event)

    assert shell.state.phase is Phase.FINISHED
    assert not shell.state.devices["c"].excluded


def test_a_device_that_returns_is_offered_its_round_again() -> None:
    shell = Shell()
    shell.arrive()
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
        shell.arrive()
        shell.run()
        chosen.append([tuple(h["devices"]) for h in shell.state.history])

    assert chosen[0] == chosen[1]
    assert all(len(c) == 2 for c in chosen[0])
    assert len(set(chosen[0])) > 1


def test_exploration_asks_everybody_and_later_rounds_a_share() -> None:
    shell = Shell(replace(JOB, strategy="autoflip", participation=0.5))
    shell.arrive()
    shell.run()
    assert [len(h["devices"]) for h in shell.state.history] == [3, 2, 2]


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


PI = profile_store.find("raspberry-pi-5")


def planned_fleet(deadline_s: float = 10_000) -> Coordinator:
    job = replace(JOB, density=0.0, devices=1, rounds=9, deadline_s=deadline_s)
    coordinator = Coordinator(job, ARCHITECTURE, State(model="m0"))
    coordinator.handle(on.DeviceBorn("a", 1, PI.to_dict(), 10), 0.0)
    return coordinator


def play(coordinator: Coordinator, times: float) -> None:
    """One round in which steps take so many times as long as the plan says."""
    state = coordinator.state
    coordinator.handle(on.Scored(state.round, "r"), 0.0)
    offer = {"weights": {"sha256": digest(state.round)}, "widths": [2], "recipe": coordinator.job.recipe.to_offer()}
    coordinator.handle(on.Extracted(state.round, "a", 1, offer), 0.0)
    plan = state.devices["a"].plan
    assert plan is not None
    metrics = {"step_seconds": times * plan["prediction"]["step_s"]}
    update = on.UpdateAnnounced("a", state.round, 1, digest(state.round), {"sha256": "u"}, 10, 1, metrics)
    coordinator.handle(update, 0.0)
    coordinator.handle(on.UpdateStored("a", state.round, 1, "w"), 0.0)
    coordinator.handle(on.Folded("a", state.round, 1), 0.0)


def test_a_rounds_own_times_correct_a_plan_that_was_far_off() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    play(coordinator, 3.0)
    device = coordinator.state.devices["a"]
    assert before is not None
    assert device.plan is not None
    assert device.correction == {"step": pytest.approx(3.0), "latency": 1.0}
    assert device.plan["prediction"]["step_s"] == pytest.approx(3 * before["prediction"]["step_s"])
    assert State.from_json(coordinator.state.to_json()).devices["a"] == device


def test_a_plan_that_was_nearly_right_stays_as_it_is() -> None:
    coordinator = planned_fleet()
    before = coordinator.state.devices["a"].plan
    play(coordinator, 1.1)
    assert coordinator.state.devices["a"].plan == before


def test_times_at_other_widths_than_the_plans_teach_nothing() -> None:
    """The device came again, as a board that may send less, after its part in the round was settled."""
    coordinator = planned_fleet()
    narrow = predict(ARCHITECTURE, (4,), PI, coordinator.job.recipe, 10).round_bytes
    weaker = replace(PI, link=replace(PI.link, bytes_per_round=narrow))
    coordinator.handle(on.DeviceBorn("a", 2, weaker.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    before = device.plan
    assert (device.widths, coordinator.state.tasks["a"].widths) == ((4,), ARCHITECTURE.sizes)
    play(coordinator, 3.0)
    assert coordinator.state.tasks["a"].progress is Progress.FOLDED
    assert (device.correction, device.plan) == ({}, before)


def too_slow() -> Coordinator:
    """A fleet after a round that was so slow that no width would be fast enough."""
    probing = planned_fleet().state.devices["a"].plan
    assert probing is not None
    round_s = 1.5 * probing["prediction"]["train_s"] + probing["prediction"]["transfer_s"]
    coordinator = planned_fleet(deadline_s=round_s)
    device = coordinator.state.devices["a"]
    before = device.plan, device.widths
    play(coordinator, 1e9)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert (device.plan, device.widths) == before
    return coordinator


def test_a_device_that_turns_out_too_slow_for_any_width_goes_on_as_it_is() -> None:
    assert too_slow().state.devices["a"].correction["step"] == 5


@pytest.mark.parametrize("samples", [10, 9])
def test_a_device_that_is_too_slow_may_connect_anew(samples: int) -> None:
    coordinator = too_slow()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), samples), 0.0)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert device.widths == ARCHITECTURE.sizes


def test_a_device_that_is_too_slow_outlasts_a_restart_and_unlearns() -> None:
    before = too_slow()
    coordinator = Coordinator(before.job, ARCHITECTURE, State.from_json(before.state.to_json()))
    coordinator.resume(0.0)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10), 0.0)
    device = coordinator.state.devices["a"]
    assert not device.excluded
    assert device.widths == ARCHITECTURE.sizes

    coordinator.handle(on.Closed(1, "m1"), 0.0)
    coordinator.handle(on.Evaluated(1, {}), 0.0)
    play(coordinator, 1.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(1)


def test_a_device_that_no_width_fits_stays_out_whatever_it_learnt() -> None:
    coordinator = too_slow()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10**9), 0.0)
    assert "breaks" in coordinator.state.devices["a"].excluded


def test_what_was_learnt_of_a_guess_is_forgotten_once_the_board_has_measured() -> None:
    coordinator = planned_fleet()
    play(coordinator, 3.0)
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(4e9))
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction == {}

    coordinator = planned_fleet()
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    play(coordinator, 3.0)
    other = replace(probe, memory_available=6 * 10**9)
    coordinator.handle(on.DeviceBorn("a", 3, PI.to_dict(), 10, other.to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(3.0)


def test_what_was_learnt_in_blocks_says_nothing_of_standard_operators() -> None:
    coordinator = planned_fleet()
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, latency=typical_table(4e9), block=16)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 10, probe.to_dict()), 0.0)
    play(coordinator, 3.0)
    assert coordinator.state.devices["a"].correction
    coordinator.handle(on.DeviceBorn("a", 3, PI.to_dict(), 10, replace(probe, block=0).to_dict()), 0.0)
    assert coordinator.state.devices["a"].correction == {}


def test_what_was_learnt_outlasts_a_new_connection() -> None:
    coordinator = planned_fleet()
    play(coordinator, 3.0)
    coordinator.handle(on.DeviceBorn("a", 2, PI.to_dict(), 11), 0.0)
    assert coordinator.state.devices["a"].correction["step"] == pytest.approx(3.0)


def test_what_a_probe_says_of_blocks_reaches_whoever_makes_the_offer() -> None:
    job = replace(JOB, devices=3)
    coordinator = Coordinator(job, ARCHITECTURE, State(model=digest("first")))
    probe = ProbeReport(4, 8 * 10**9, 7 * 10**9, 1.0, block=16).to_dict()
    older = {k: v for k, v in probe.items() if k != "block"}
    said = {"a": probe, "b": older, "c": None}
    commands = [
        command
        for name, report in said.items()
        for command in coordinator.handle(on.DeviceBorn(name, 1, PI.to_dict(), 10, report), 0.0)
    ]
    assert [type(c) for c in commands] == [do.Score]
    asked = coordinator.handle(on.Scored(1, digest("ranking")), 0.0)
    wanted = {"a": 16, "b": 0, "c": 0}
    assert {c.part.device: c.block for c in asked if isinstance(c, do.Extract)} == wanted
    again = Coordinator(job, ARCHITECTURE, State.from_json(coordinator.state.to_json())).resume(1.0)
    assert {c.part.device: c.block for c in again if isinstance(c, do.Extract)} == wanted


def test_all_that_an_offer_names_is_kept() -> None:
    refs = {name: {"sha256": digest(name), "size": 1, "leaves": digest(name)} for name in ("weights", "x", "y")}
    state = State(model=digest("first"))
    offer = {"weights": refs["weights"], "blocked": {"16": refs["x"]}, "lowered": {"int8": refs["y"]}, "widths": [1]}
    state.tasks["a"] = Task(1, (1,), offer=offer)
    assert state.references() >= {ref["sha256"] for ref in refs.values()}


def test_devices_that_come_together_all_take_part_in_the_round_that_begins_with_them() -> None:
    shell = Shell(replace(JOB, devices=1))
    for name in NAMES:
        assert not shell.state.tasks
        shell.feed(replace(on.DeviceBorn(name, 1, {"name": "toy"}, 10), more=name != NAMES[-1]))
    assert set(shell.state.tasks) == set(NAMES)


def test_a_device_that_was_away_for_another_job_has_failed_as_often_as_before() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.state.devices["a"].failures = 2
    for session, failures in ((1, 2), (2, 0)):
        shell.feed(on.DeviceDied("a", 1))
        shell.feed(on.DeviceBorn("a", session, {"name": "toy"}, 10))
        assert shell.state.devices["a"].failures == failures
