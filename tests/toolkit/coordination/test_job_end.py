"""A job ends with the round in which its fleet has spent a total, whatever restarts, and says why it ended."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.job_end import early_end_reason
from fedprune.jobs.job import Job
from support.fakes import asynchronous_shell, synchronous_shell
from support.fakes.asynchronous_shell import job_of
from support.fakes.coordinator_shell import Shell
from support.fakes.tiny_job import JOB

TOTALS: list[dict[str, Any]] = [{"total_bytes": 2000}, {"total_macs": 20}, {"total_hours": 1.0}]


def spends(answer: Callable[[do.Command], on.Event | None], shell: Shell) -> Callable[[do.Command], on.Event | None]:
    """Every round takes half an hour, and costs 1,000 bytes and 10 MACs."""

    def spend(command: do.Command) -> on.Event | None:
        event = answer(command)
        if isinstance(event, on.Closed):
            shell.now += 1800
            event = replace(event, spent_bytes=1000 * event.round, spent_macs=10 * event.round)
        return event

    return spend


def shell_of(job: Job) -> Any:
    shell: Any = (synchronous_shell if job.strategy == "plain" else asynchronous_shell).Shell(job)
    shell.answer = spends(shell.answer, shell)
    return shell


@pytest.mark.parametrize("total", TOTALS, ids=str)
@pytest.mark.parametrize("job", [replace(JOB, rounds=9), job_of(arrivals=3, rounds=9)], ids=lambda job: job.strategy)
def test_a_total_ends_a_job_with_the_round_in_which_it_is_reached(job: Job, total: dict[str, Any]) -> None:
    shell = shell_of(replace(job, **total))
    shell.arrive()
    while not shell.state.history:
        shell.feed(shell.inbox.pop(0))
    shell.crash()  # the count goes on
    shell.run()
    assert (shell.state.phase, shell.state.round) == (Phase.FINISHED, 2)
    (name,) = total
    assert early_end_reason(shell.job, shell.state).startswith("ended after round 2 of 9: ")
    assert name in early_end_reason(shell.job, shell.state)
    assert do.Finish(shell.state.model, early_end_reason(shell.job, shell.state)) in shell.coordinator.resume(shell.now)
    shell.now += 1e9  # time after the end doesn't count
    shell.job = replace(job, **{name: 2 * total[name]})
    shell.crash()
    assert shell.state.phase is not Phase.FINISHED
    shell.run()
    assert shell.state.round > 2


@pytest.mark.parametrize("job", [replace(JOB, rounds=2), job_of(arrivals=3, rounds=2)], ids=lambda job: job.strategy)
def test_rounds_that_were_taken_back_before_they_began_are_not_trained(job: Job) -> None:
    shell = shell_of(job)
    shell.arrive()
    shell.run()
    shell.feed(on.Paused(True))
    shell.job = replace(job, rounds=9)
    shell.crash()
    assert shell.state.phase is Phase.WAITING
    shell.job = replace(shell.job, total_bytes=2000)
    shell.crash()
    shell.run()
    assert (shell.state.phase, shell.state.round) == (Phase.FINISHED, 2)


def test_what_a_round_has_seen_stays_spent() -> None:
    """After a crash the shell may have counted less."""
    shell = shell_of(replace(JOB, rounds=9, total_bytes=2000))
    shell.arrive()
    while (shell.state.phase, shell.state.round) != (Phase.TRAINING, 1):
        shell.feed(shell.inbox.pop(0))
    shell.feed(on.Closed(0, "m", spent_bytes=5000, spent_macs=7))
    shell.run()
    assert (shell.state.round, shell.state.spent_bytes, shell.state.spent_macs) == (1, 5000, 10)
