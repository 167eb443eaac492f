"""A job that is paused: nothing new is begun, what is under way counts, and going on brings the job to its end."""

from __future__ import annotations

import pytest

from fedprune.coordination import Phase, State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from support.fakes import asynchronous_shell
from support.fakes.asynchronous_shell import KINDS

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
