"""Detection of a fleet that makes no progress, which a virtual clock would otherwise simulate for ever."""

from __future__ import annotations

from collections import Counter

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.core.errors import PlanError
from fedprune.model.recipe import Recipe
from fedprune_server.executor.divergence import advice

MAX_ATTEMPTS = 20
"""Attempts after which a round that no device has finished is given up."""

MAX_BIRTHS = 200
"""Connections per device, without any training, after which the simulation ends."""


class StallDetector:
    """Ends a simulation that no device brings forward."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._births = 0
        self._offers_without_update = Counter[str]()

    def trained(self) -> None:
        """A device has finished a training."""
        self._births = 0

    def progressed(self) -> None:
        """An update has arrived, or a round has ended."""
        self._offers_without_update.clear()

    def connected(self, state: State) -> None:
        """A device has connected.

        Raises:
            PlanError: Devices connected too often since one trained.
        """
        self._births += 1
        if self._births > MAX_BIRTHS * self._devices:
            raise PlanError("devices connect and disconnect, and none of them ever trains", hint=standstill(state))

    def offered(self, command: do.SendOffer, state: State, refusal: str) -> None:
        """A device is offered a part.

        An asynchronous job counts attempts per device, and a device may see many while the round is open for others.
        There only offers count between which no update arrived, while the round has no deadline.

        Args:
            command: The offer.
            state: The coordinator's state.
            refusal: Reason of the last refusal of an offer; empty without any.

        Raises:
            PlanError: The round was offered `MAX_ATTEMPTS` times in vain.
        """
        task = state.tasks.get(command.device)
        if task is None or task.basis is None:
            over = command.attempt > MAX_ATTEMPTS
        elif command.attempt == 1 or state.deadline is not None:
            over = False
        else:
            self._offers_without_update[command.device] += 1
            over = self._offers_without_update[command.device] >= MAX_ATTEMPTS
        if over:
            raise PlanError(
                f"no device finished round {command.round} in {MAX_ATTEMPTS} attempts",
                got=refusal or None,
                hint="" if refusal else "Raise deadline_s, or ask for less training.",
            )


def standstill(state: State, recipe: Recipe | None = None) -> str:
    """Why no round begins, with advice where training with this recipe diverged."""
    reasons = sorted({d.excluded for d in state.devices.values() if d.excluded})
    if not reasons:
        return "Fewer devices can take part than job.devices asks for."
    advised = advice([], [d.excluded for d in state.devices.values()], recipe.to_dict()) if recipe else ""
    return f"{reasons[0]}. {advised[:1].upper()}{advised[1:]}" if advised else reasons[0]
