"""Boards that refuse in asynchronous jobs; in all jobs, updates that are at fault only when their round closes."""

from dataclasses import replace

import pytest

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from support.fakes.asynchronous_shell import ALL, WINDOW, Shell, job_of, model_digest
from support.fakes.tiny_job import JOB

pytestmark = pytest.mark.board


class FullDisk(Shell):
    """One board refuses whatever it is offered."""

    def __init__(self) -> None:
        super().__init__(job_of(arrivals=1, rounds=300, deadline_s=50))
        self.refusals: list[float] = []

    def answer(self, command: do.Command) -> on.Event | None:
        self.now += 0.1
        if isinstance(command, do.SendOffer) and command.device == "c":
            self.refusals.append(self.now)
            return on.OfferRefused("c", command.round, command.attempt, "no room")
        return super().answer(command)


def test_a_board_that_refuses_is_left_alone_until_its_time_is_over() -> None:
    shell = FullDisk()
    shell.come()
    while shell.state.round < 250:
        if shell.wakes and min(shell.wakes) <= shell.now:
            shell.tick()
        else:
            shell.feed(shell.inbox.pop(0))
    assert shell.now > 100
    assert [b - a >= 49 for a, b in zip(shell.refusals, shell.refusals[1:], strict=False)] == [True, True]
    assert "no room" in shell.state.devices["c"].excluded
    refused_rounds = [h["round"] for h in shell.state.history if "c" in h["devices"]]
    assert len(refused_rounds) == 3, "every refusal stands in one round's summary"
    assert "c" not in shell.state.tasks, "the last refusal's time is over"


class Faulty(Shell):
    """Some updates are at fault in some rounds."""

    def __init__(self, faults: dict[int, set[str]], job: Job = WINDOW) -> None:
        super().__init__(job)
        self.faults = faults

    def answer(self, command: do.Command) -> on.Event | None:
        if not isinstance(command, do.Close):
            return super().answer(command)
        self.closes.append(command)
        bad = self.faults.get(command.round, set()) & {c.part.device for c in command.contributions}
        left = tuple(c for c in command.contributions if c.part.device not in bad)
        rejected = dict.fromkeys(sorted(bad), "out of bounds")
        if not left:
            return on.Closed(command.round, command.model, command.memory, rejected)
        return on.Closed(command.round, model_digest(replace(command, contributions=left)), {}, rejected)


def test_a_kept_update_that_no_longer_fits_is_forgotten() -> None:
    shell = Faulty({})
    shell.come()
    slow = shell.until(on.UpdateAnnounced, "c")
    while shell.state.round < 2:
        if shell.inbox:
            shell.feed(shell.inbox.pop(0))
        else:
            shell.tick()
    assert shell.state.devices["a"].buffer is not None
    shell.inbox = [e for e in shell.inbox if getattr(e, "device", "") != "a"]  # no more of a
    shell.feed(slow)
    shell.faults = {2: {"a"}}
    while shell.state.round < 3:
        if shell.inbox:
            event = shell.inbox.pop(0)
            if not (isinstance(event, on.UpdateAnnounced) and event.device == "a"):
                shell.feed(event)
        else:
            shell.tick()
    assert {c.part.device for c in shell.closes[-1].contributions} == {"a", "b", "c"}
    assert shell.state.devices["a"].buffer is None
    assert shell.state.devices["a"].failures == 1  # it was silent; the kept update is no failure
    assert shell.state.devices["b"].buffer is not None


@pytest.mark.parametrize("job", [ALL, WINDOW], ids=["all", "window"])
def test_a_round_in_which_nobody_is_left_goes_on_collecting(job: Job) -> None:
    shell = Faulty({1: {"a", "b", "c"}}, job)
    shell.come()
    while not shell.closes:
        if shell.inbox:
            shell.feed(shell.inbox.pop(0))
        else:
            shell.tick()
    shell.feed(shell.inbox.pop(0))
    assert (shell.state.phase, shell.state.round, shell.state.model) == (Phase.TRAINING, 1, "m0")
    assert not shell.state.history
    asked = len(shell.offered)
    shell.run_silently()
    assert len(shell.offered) == asked, "who was at fault is not asked at once"
    shell.crash()
    shell.faults = {}
    shell.run()
    assert shell.state.phase is Phase.FINISHED
    assert [h["round"] for h in shell.state.history] == list(range(1, job.rounds + 1))


@pytest.mark.parametrize("later", [0.0, 500.0])
def test_a_synchronous_round_in_which_nobody_is_left_starts_anew_when_its_time_is_over(later: float) -> None:
    shell = Faulty({1: {"a", "b", "c"}}, JOB)
    shell.come()
    while not shell.closes:
        shell.feed(shell.inbox.pop(0))
    shell.now += later
    shell.feed(shell.inbox.pop(0))
    assert (shell.state.round, shell.state.model, shell.state.history) == (1, "m0", [])
    assert (not shell.inbox) == (not later), "who was at fault is not asked at once"
    shell.crash()
    shell.faults = {}
    shell.run()
    assert shell.state.phase is Phase.FINISHED
    assert ("a", 1, 2) in shell.offered
    assert [h["round"] for h in shell.state.history] == [1, 2, 3]
