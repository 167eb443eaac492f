"""A job that a server may have saved."""

from __future__ import annotations

from fedprune.coordination import Coordinator, State
from fedprune.coordination import events as on
from toy import ARCHITECTURE, JOB


def born(name: str, session: int = 1) -> on.DeviceBorn:
    return on.DeviceBorn(name, session, {"name": "board"}, 10)


def filled() -> State:
    """A state in the middle of a second round."""
    state = State(model="m" * 64)
    coordinator = Coordinator(JOB, ARCHITECTURE, state)
    for name in "abc":
        coordinator.handle(born(name), 0.0)
    for number in (1, 2):
        coordinator.handle(on.Scored(number, "r" * 64), 1.0)
        offer = {"weights": {"sha256": "w" * 64, "size": 5}, "widths": [2], "recipe": JOB.recipe.to_offer()}
        for name in "abc":
            coordinator.handle(on.Extracted(number, name, 1, offer), 2.0)
        if number == 2:
            break
        for name in "abc":
            coordinator.handle(
                on.UpdateAnnounced(name, 1, 1, "w" * 64, {"sha256": "u" * 64}, 10, 5, {"loss": 0.1}), 3.0
            )
            coordinator.handle(on.UpdateStored(name, 1, 1, "u" * 64), 3.0)
            coordinator.handle(on.Folded(name, 1, 1), 3.0)
        coordinator.handle(on.Closed(1, "n" * 64), 4.0)
        coordinator.handle(on.Evaluated(1, {"accuracy": 0.5}), 5.0)
    return state
