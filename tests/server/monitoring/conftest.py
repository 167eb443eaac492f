"""A job as a coordinator plays it, for those who watch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune_server.monitoring.observer import Observer
from support.fakes.static_job_view import StillJob
from support.fakes.stored_job import TO_THE_SECOND_ROUND
from support.fakes.tiny_job import ARCHITECTURE, JOB


@pytest.fixture
def played() -> Callable[[Observer], State]:
    """Lets somebody look on while a job gets into its second round, a second for each event."""

    def play(watch: Observer) -> State:
        state = State(model="m" * 64)
        coordinator = SynchronousCoordinator(JOB, ARCHITECTURE, state)
        told = 0
        for i, event in enumerate(TO_THE_SECOND_ROUND):
            now = 1000.0 + i
            commands = coordinator.handle(event, now)
            watch.event(event, now)
            for summary in state.history[told:]:
                watch.round_over(summary, now, StillJob())
            told = len(state.history)
            for command in commands:
                watch.command(command, now)
        return state

    return play
