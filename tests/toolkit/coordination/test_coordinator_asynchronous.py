"""Asynchronous jobs under every order of events: nothing counts twice, nothing is lost, a crash changes nothing."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import convert

from fedprune.coordination import Phase, State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from support.fakes.asynchronous_shell import ALL, KINDS, ONE, WINDOW, Shell, history, job_of, model_digest
from support.fakes.tiny_job import ARCHITECTURE, NAMES

pytestmark = pytest.mark.board


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_where_all_are_awaited_order_duplicates_and_crashes_change_nothing(data: st.DataObject) -> None:
    shell = Shell(ALL)
    shell.come()
    shell.feed_in_any_order(data)
    shell.run()
    untouched = Shell(ALL)
    untouched.come()
    untouched.run()
    assert untouched.state.phase is Phase.FINISHED
    assert history(shell) == history(untouched)


class Weather(Shell):
    """A shell whose devices die, return, refuse, lose their memory and are late; the server is killed now and then."""

    def __init__(self, data: st.DataObject, job: Job) -> None:
        super().__init__(replace(job, devices=2))
        self.data = data
        self.gone: set[str] = set()
        self.rejected: set[tuple[str, int]] = set()

    def answer(self, command: do.Command) -> on.Event | None:
        if isinstance(command, (do.SendOffer, do.PullUpdate)) and command.device in self.gone:
            return None
        return super().answer(command)

    def feed(self, event: on.Event) -> None:
        """Whatever is said twice changes the state once."""
        super().feed(event)
        if not isinstance(event, on.Ticked):
            before = self.state.to_json()
            self.carry_out(self.coordinator.handle(event, self.now))
            assert self.state.to_json() == before

    def act(self) -> None:
        action = self.data.draw(
            st.sampled_from(
                ["next"] * 6 + ["lose", "tick", "wait", "die", "come", "forget", "refuse", "reject", "crash"]
            )
        )
        name = self.data.draw(st.sampled_from(NAMES))
        task = self.state.tasks.get(name)
        if action in ("next", "lose") and self.inbox:
            event = self.inbox.pop(self.data.draw(st.integers(0, len(self.inbox) - 1)))
            # Workers don't lose their answers; what comes from devices may be lost.
            if action == "next" or not isinstance(event, (on.UpdateAnnounced, on.UpdateStored)):
                self.feed(event)
        elif action == "tick":
            self.now += self.data.draw(st.sampled_from([1.0, 11.0, 101.0]))
            while self.wakes and min(self.wakes) <= self.now:
                self.wakes.remove(min(self.wakes))
                self.feed(on.Ticked())
        elif action == "wait":
            self.now += 1.0
        elif action == "die":
            self.gone.add(name)
            self.feed(on.DeviceDied(name, self.sessions[name]))
        elif action in ("come", "forget"):
            self.gone.discard(name)
            self.sessions[name] = 0 if action == "forget" else self.sessions[name]
            self.come(name)
        elif action == "refuse" and task is not None:
            self.feed(on.OfferRefused(name, self.state.round_of(task), task.attempt, "no room"))
        elif action == "reject" and task is not None:
            if task.progress is Progress.STORED:
                self.rejected.add((name, self.state.round_of(task)))
            self.feed(on.UpdateRejected(name, self.state.round_of(task), task.attempt, "not finite"))
        elif action == "crash":
            self.coordinator = make_coordinator(self.job, ARCHITECTURE, State.from_json(self.state.to_json()))
            self.inbox.clear()
            self.wakes.clear()
            self.carry_out(self.coordinator.resume(self.now))

    def final_closes(self) -> Iterator[do.Close]:
        """Of each round the close that became its model; all others of it say the same."""
        for number in range(1, self.job.rounds + 1):
            mine = [c for c in self.closes if c.round == number]
            assert len({model_digest(c) for c in mine}) == 1
            yield mine[-1]


@pytest.mark.parametrize("job", KINDS.values(), ids=KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_job_ends_whatever_the_weather_was(job: Job, data: st.DataObject) -> None:
    shell = Weather(data, job)
    shell.come()
    for _ in range(60):
        shell.act()
    for _ in range(60):  # the sun comes out
        if shell.state.phase is Phase.FINISHED:
            break
        shell.gone.clear()
        shell.come()
        shell.run()
    assert shell.state.phase is Phase.FINISHED
    schedule = shell.coordinator.schedule
    counted: set[tuple[str, int]] = set()
    model = "m0"
    for close in shell.final_closes():
        assert close.model == model
        model = model_digest(close)
        names = [c.part.device for c in close.contributions]
        assert names == sorted(set(names))
        assert names
        fresh = [c for c in close.contributions if (c.part.device, c.basis.round) not in counted]
        assert schedule.keep or fresh == list(close.contributions), "an update counts once"
        assert not schedule.arrivals or 1 <= len(fresh) <= schedule.arrivals
        counted |= {(c.part.device, c.basis.round) for c in fresh}
        for c in close.contributions:
            assert close.round - c.basis.round >= 0
            assert schedule.accepts_staleness(close.round - c.basis.round)
            assert c.weight >= 1
    assert history(shell)[-1][1] == model
    if not schedule.max_staleness:
        # Of the last rounds some may have come too late.
        safe = {sender for sender, number in shell.acknowledged.items() if number < shell.job.rounds - len(NAMES)}
        assert safe <= counted | shell.rejected, "whoever was told that its update is safe was told the truth"


@pytest.mark.parametrize("job", KINDS.values(), ids=KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
@pytest.mark.at_push(2)
def test_the_same_events_give_the_same_commands_and_states(job: Job, seed: int) -> None:
    chance = random.Random(seed)
    shell = Shell(replace(job, devices=2))
    shell.come()
    while shell.inbox or (shell.wakes and shell.state.phase is not Phase.FINISHED):
        if not shell.inbox or chance.random() < 0.1:
            shell.now += chance.choice([0.5, 7.0, 120.0])
            if shell.wakes and min(shell.wakes) <= shell.now:
                shell.tick()
        elif shell.inbox:
            shell.feed(shell.inbox.pop(chance.randrange(len(shell.inbox))))
    replay = make_coordinator(shell.job, ARCHITECTURE, State(model="m0"))
    for event, now, commands in shell.log:
        assert replay.handle(event, now) == commands
        replay = make_coordinator(shell.job, ARCHITECTURE, State.from_json(replay.state.to_json()))
    assert replay.state == shell.state


def test_whoever_is_idle_is_offered_the_current_model_at_once() -> None:
    shell = Shell(ONE)
    shell.come()
    delayed_updates = [shell.until(on.UpdateAnnounced, n) for n in ("c", "b")]
    shell.feed(shell.until(on.UpdateAnnounced, "a"))
    second_update = shell.until(on.UpdateAnnounced, "a")
    assert isinstance(second_update, on.UpdateAnnounced)
    assert (second_update.round, shell.state.round, shell.state.phase) == (2, 2, Phase.TRAINING)
    shell.feed(delayed_updates[0])
    shell.until(on.Evaluated)
    close = shell.closes[-1]
    assert [(c.part.device, c.basis.round, c.basis.model) for c in close.contributions] == [("c", 1, "m0")]
    assert close.rate == pytest.approx(0.5 * 2**-0.5)


def test_a_window_takes_what_has_come_and_what_is_kept() -> None:
    shell = Shell(WINDOW)
    shell.come()
    slow = shell.until(on.UpdateAnnounced, "c")
    while shell.inbox:
        shell.feed(shell.inbox.pop(0))
    assert not shell.closes
    shell.tick()
    assert shell.now == 10.0
    assert [c.part.device for c in shell.closes[0].contributions] == ["a", "b"]
    shell.run_silently()
    shell.feed(slow)
    shell.run_silently()
    shell.wakes.append(20.0)
    shell.tick()
    assert len(shell.closes) == 1, "one update alone doesn't close a window"
    assert shell.state.references() >= {"m0", shell.state.model}, "models that kept updates were cut from"


def test_kept_updates_keep_their_blobs() -> None:
    shell = Shell(WINDOW)
    shell.come()
    shell.run()
    for device in shell.state.devices.values():
        assert device.buffer is not None
        contribution = convert(device.buffer["contribution"], do.Contribution)
        assert shell.state.references() >= {
            contribution.weights,
            contribution.sent,
            contribution.basis.model,
            contribution.basis.ranking,
        }
    assert len(shell.closes[-1].contributions) == 3


def test_rankings_and_evaluations_can_be_rare() -> None:
    shell = Shell(job_of(arrivals=3, rounds=7, score_every=3, evaluate_every=4))
    shell.come()
    shell.run()
    scored = [e.round for e, _, _ in shell.log if isinstance(e, on.Scored)]
    evaluated = [e.round for e, _, _ in shell.log if isinstance(e, on.Evaluated)]
    assert scored == [1, 4, 7]
    assert evaluated == [4, 7]
    assert [bool(h["metrics"]) for h in shell.state.history] == [False, False, False, True, False, False, True]


def test_devices_take_turns_where_few_may_work_at_a_time() -> None:
    shell = Shell(job_of(arrivals=1, concurrent=1, rounds=len(NAMES)))
    shell.come()
    shell.run()
    assert sorted(device for device, _, _ in shell.offered[: len(NAMES)]) == list(NAMES)


@pytest.mark.parametrize(
    ("job", "cancelled", "offer"),
    [(job_of(arrivals=1, rounds=5, max_staleness=1), [("c", 1)], ("c", 3, 1)), (ALL, [], ("c", 1, 2))],
)
def test_late_work_is_stopped_if_the_model_has_moved_too_far_and_else_asked_for_again(
    job: Job, cancelled: list[tuple[str, int]], offer: tuple[str, int, int]
) -> None:
    shell = Shell(job)
    shell.come()
    old = shell.until(on.UpdateAnnounced, "c")
    shell.now = 1.0
    while offer not in shell.offered:
        shell.tick() if not shell.inbox else shell.feed(shell.inbox.pop(0))
    assert [(name, number) for name, number, _ in shell.cancellations] == cancelled
    shell.feed(old)
    assert len(shell.cancellations) == 1 + len(cancelled)
