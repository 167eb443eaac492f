"""How long a simulation waits for a fleet that gets nowhere: a virtual clock would else go on for ever."""

from __future__ import annotations

from collections import Counter

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.core.errors import PlanError
from fedprune.training.recipe import Recipe
from fedprune_server.executor.divergence import advice

MAX_ATTEMPTS = 20
"""A round that nobody finished in this many attempts never will be."""

MAX_BIRTHS = 200
"""A fleet whose devices came so many times each without a training never gets to one."""


class Patience:
    """Ends a simulation that no device brings forward.

    Args:
        devices: How many there are.
    """

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._births = 0
        self._vain = Counter[str]()

    def trained(self) -> None:
        """A device has trained."""
        self._births = 0

    def moved(self) -> None:
        """An update has come, or a round has ended."""
        self._vain.clear()

    def born(self, state: State) -> None:
        """A device has come.

        Raises:
            PlanError: Devices came too often since one trained.
        """
        self._births += 1
        if self._births > MAX_BIRTHS * self._devices:
            raise PlanError("devices come and go, and none of them ever trains", hint=excuse(state))

    def offered(self, command: do.SendOffer, state: State, refusal: str) -> None:
        """A device is offered a part.

        In an asynchronous job attempts are a device's own, and may be many while a window is open for the others: only
        such count between which no update came, while no end of the round is in sight.

        Args:
            command: The offer.
            state: The coordinator's state.
            refusal: Why a device refused an offer, last; empty if none did.

        Raises:
            PlanError: The round was offered so often that nobody will ever finish it.
        """
        task = state.tasks.get(command.device)
        if task is None or task.basis is None:
            over = command.attempt > MAX_ATTEMPTS
        elif command.attempt == 1 or state.deadline is not None:
            over = False
        else:
            self._vain[command.device] += 1
            over = self._vain[command.device] >= MAX_ATTEMPTS
        if over:
            raise PlanError(
                f"nobody finished round {command.round} in {MAX_ATTEMPTS} attempts",
                got=refusal or None,
                hint="" if refusal else "Raise deadline_s, or ask for less training.",
            )


def excuse(state: State, recipe: Recipe | None = None) -> str:
    """Why no round begins, and what to change where training with this recipe ran away."""
    reasons = sorted({d.excluded for d in state.devices.values() if d.excluded})
    if not reasons:
        return "Fewer devices can take part than job.devices asks for."
    spoilt = advice([], [d.excluded for d in state.devices.values()], recipe.to_dict()) if recipe else ""
    return f"{reasons[0]}. {spoilt[:1].upper()}{spoilt[1:]}" if spoilt else reasons[0]
