"""A job that a server may have saved."""

from fedprune.coordination import State, SynchronousCoordinator
from fedprune.coordination import events as on
from support.fakes.tiny_job import ARCHITECTURE, JOB


def born(name: str, session: int = 1) -> on.DeviceBorn:
    return on.DeviceBorn(name, session, {"name": "board"}, 10)


OFFER = {"weights": {"sha256": "w" * 64, "size": 5}, "widths": [2], "recipe": JOB.recipe.to_offer()}
TO_THE_SECOND_ROUND: list[on.Event] = [
    *(born(name) for name in "abc"),
    on.Scored(1, "r" * 64),
    *(on.Extracted(1, name, 1, OFFER) for name in "abc"),
    *(on.UpdateAnnounced(n, 1, 1, "w" * 64, {"sha256": "u" * 64}, 10, 5, {"loss": 0.1}) for n in "abc"),
    *(on.UpdateStored(name, 1, 1, "u" * 64) for name in "abc"),
    *(on.Folded(name, 1, 1) for name in "abc"),
    on.Closed(1, "n" * 64),
    on.Evaluated(1, {"accuracy": 0.5}),
    on.Scored(2, "r" * 64),
    *(on.Extracted(2, name, 1, OFFER) for name in "abc"),
]


def second_round_state() -> State:
    """A state in the middle of a second round."""
    state = State(model="m" * 64)
    coordinator = SynchronousCoordinator(JOB, ARCHITECTURE, state)
    for event in TO_THE_SECOND_ROUND:
        coordinator.handle(event, 1.0)
    return state
