"""The coordinator under every order of events: nothing counts twice, nothing is lost, a crash changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.coordination import Phase, State, SynchronousCoordinator, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ConfigError, StorageError
from fedprune.jobs.job import Job
from fedprune.jobs.state import Task
from support.fakes.coordinator_shell import digest
from support.fakes.synchronous_shell import Shell
from support.fakes.tiny_job import ARCHITECTURE, JOB, NAMES

pytestmark = pytest.mark.board


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
            self.coordinator = SynchronousCoordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
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


def test_a_round_that_all_refuse_starts_again_long_before_its_deadline() -> None:
    shell = Shell()
    shell.arrive()
    while shell.state.deadline is None:
        shell.feed(shell.inbox.pop(0))
    shell.inbox.clear()
    for name in NAMES:
        assert {t.attempt for t in shell.state.tasks.values()} == {1}
        shell.feed(on.OfferRefused(name, 1, 1, "no metric"))
    retry = shell.wakes[-1]
    assert shell.now < retry < shell.now + JOB.deadline_s / 2  # boards may recover, and refusals don't make rounds spin
    shell.now = retry
    shell.feed(on.Ticked())
    assert (shell.state.round, {t.attempt for t in shell.state.tasks.values()}) == (1, {2})


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
    assert [c for c in commands if not isinstance(c, do.Wake)] == [
        do.Finish("m7", "ended after round 7 of 100: the strategy ended the job")
    ]
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
    shell.coordinator = SynchronousCoordinator(
        replace(JOB, density=0.25), ARCHITECTURE, State.from_json(shell.state.to_json())
    )
    shell.coordinator.resume(0.0)

    assert shell.state.devices["a"].widths == (2,)


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


def test_all_that_an_offer_names_is_kept() -> None:
    refs = {name: {"sha256": digest(name), "size": 1, "leaves": digest(name)} for name in ("weights", "y")}
    state = State(model=digest("first"))
    offer = {"weights": refs["weights"], "lowered": {"int8": refs["y"]}, "widths": [1]}
    state.tasks["a"] = Task(1, (1,), offer=offer)
    assert state.references() >= {ref["sha256"] for ref in refs.values()}


def test_devices_that_come_together_all_take_part_in_the_round_that_begins_with_them() -> None:
    shell = Shell(replace(JOB, devices=1))
    for name in NAMES:
        assert not shell.state.tasks
        shell.feed(replace(on.DeviceBorn(name, 1, {"name": "toy"}, 10), more=name != NAMES[-1]))
    assert set(shell.state.tasks) == set(NAMES)


def test_devices_share_the_codecs_that_are_known_and_names_of_others_are_not_kept() -> None:
    shell = Shell()
    for name, codecs in (("a", ("zlib", "int8")), ("b", ("strange", "int8", "zlib", "zlib")), ("c", ())):
        shell.feed(on.DeviceBorn(name, 1, {"name": "toy"}, 10, codecs=codecs))
    a, b, c = (shell.state.devices[name].codecs for name in "abc")
    assert a is b
    assert (a, c) == (["zlib", "int8"], [])


def test_a_device_that_was_away_for_another_job_has_failed_as_often_as_before() -> None:
    shell = Shell()
    shell.arrive()
    shell.run()
    shell.state.devices["a"].failures = 2
    for session, failures in ((1, 2), (2, 0)):
        shell.feed(on.DeviceDied("a", 1))
        shell.feed(on.DeviceBorn("a", session, {"name": "toy"}, 10))
        assert shell.state.devices["a"].failures == failures


def test_a_round_that_all_refuse_for_thousands_of_attempts_goes_on_being_tried() -> None:
    shell = Shell()
    shell.arrive()
    while shell.inbox and not isinstance(shell.inbox[0], on.UpdateAnnounced):
        shell.feed(shell.inbox.pop(0))
    for task in shell.state.tasks.values():
        task.attempt = 5000
    for name in NAMES:
        shell.feed(on.OfferRefused(name, 1, 5000, "no room"))
    assert shell.wakes[-1] == shell.now + JOB.deadline_s
