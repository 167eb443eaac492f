"""A job that is paused: nothing new is begun, what is under way counts, and going on brings the job to its end."""

from dataclasses import replace

import pytest

from fedprune.coordination import Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from support.fakes import asynchronous_shell
from support.fakes.asynchronous_shell import ALL, KINDS
from support.fakes.timed_shell import Board, announced_shell
from support.fakes.tiny_job import JOB, NAMES

pytestmark = pytest.mark.board


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("after", [3, 20])
def test_an_asynchronous_job_offers_nothing_while_it_is_paused(kind: str, after: int) -> None:
    shell = asynchronous_shell.Shell(KINDS[kind])
    shell.arrive()
    for _ in range(after):
        if shell.inbox:
            shell.feed(shell.inbox.pop(0))
    if shell.state.phase is Phase.FINISHED:
        return
    shell.feed(on.Paused(True))
    begun = {(n, t.attempt, shell.state.round_of(t)) for n, t in shell.state.tasks.items()}
    for _ in range(400):
        if not shell.inbox:
            break
        commands = shell.feed(shell.inbox.pop(0))
        new = {(c.part.device, c.part.attempt, c.basis.round) for c in commands if isinstance(c, do.Extract)}
        assert new <= begun
    assert not shell.inbox
    assert State.from_json(shell.state.to_json()).paused
    shell.feed(on.Paused(False))
    assert shell.inbox or shell.state.phase is Phase.FINISHED or shell.wakes


@pytest.mark.parametrize(
    "job",
    [replace(JOB, rounds=1), replace(JOB, rounds=1, in_flight=3), replace(ALL, rounds=1)],
    ids=["round", "own", "asynchronous"],
)
@pytest.mark.parametrize("stalls", [False, True])
def test_a_pause_stops_the_clock_of_a_round(job: Job, stalls: bool) -> None:
    """The slow board has nine tenths of its time behind it as a pause of four deadlines begins."""
    deadline_s = job.deadline_s
    slow = Board(stalls=0.0) if stalls else Board(seconds=4.95 * deadline_s)
    shell = announced_shell(job, {name: Board() for name in NAMES} | {NAMES[0]: slow})
    while len(shell.offered) < len(NAMES):
        shell.step()
    shell.at(0.9 * deadline_s, on.Paused(True))
    shell.at(4.9 * deadline_s, on.Paused(False))
    while len(shell.offered) == len(NAMES) and not shell.state.history:
        shell.step()
    assert shell.now >= (5.0 if stalls else 4.95) * deadline_s
    assert stalls or shell.counted_devices() == [list(NAMES)]
