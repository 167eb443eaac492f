"""A job as a coordinator plays it, for those who watch."""

from collections.abc import Callable

import pytest

from fedprune.coordination import State, SynchronousCoordinator
from fedprune_server.observation.observer import Observer, RoundEnded
from support.fakes.shown_jobs import show
from support.fakes.stored_job import TO_THE_SECOND_ROUND
from support.fakes.tiny_job import ARCHITECTURE, JOB


@pytest.fixture
def play_two_rounds() -> Callable[[Observer], State]:
    """Lets somebody look on while a job gets into its second round, a second for each event."""

    def play(observer: Observer) -> State:
        state = State(model="m" * 64)
        coordinator = SynchronousCoordinator(JOB, ARCHITECTURE, state)
        count = 0
        for i, event in enumerate(TO_THE_SECOND_ROUND):
            commands = coordinator.handle(event, 1000.0 + i)
            ended, count = state.history[count:], len(state.history)
            show(observer, event, *map(RoundEnded, ended), *commands, at=1000.0 + i)
        return state

    return play
