"""Detects that a simulation makes no progress, and says why: a fleet that can't train must not run for ever."""

from __future__ import annotations

from collections import Counter

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.core.errors import PlanError
from fedprune.core.text import quantity
from fedprune.jobs.job import Job
from fedprune_server.executor.divergence import diagnose_losses

MAX_ATTEMPTS = 20  # attempts after which a round that no device has finished is given up
MAX_IDLE_CONNECTIONS = 200  # connections per device, without any training, after which the simulation ends


class StallDetector:
    """Raises `PlanError` when devices connect, or are offered a round, again and again without finishing it."""

    def __init__(self, devices: int) -> None:
        self._devices = devices
        self._births = 0
        self._offers_without_update = Counter[str]()

    def on_trained(self) -> None:
        """Note the end of a training."""
        self._births = 0

    def on_progress(self) -> None:
        """Note that an update has arrived, or a round has ended."""
        self._offers_without_update.clear()

    def on_connected(self, state: State) -> None:
        """Note a connection. Raises `PlanError` if devices connected too often without any training."""
        self._births += 1
        if self._births > MAX_IDLE_CONNECTIONS * self._devices:
            what = "devices connect and disconnect, and none of them ever trains"
            raise PlanError(what, hint=standstill_reason(state))

    def on_offered(self, command: do.SendOffer, state: State, refusal: str) -> None:
        """Note an offer to a device. An asynchronous job counts attempts per device, and a device may see many while
        the round is open for others. In such a job an offer counts only if no update arrived since the last one and the
        round has no deadline. `refusal` is the reason of the last refusal of an offer, empty without any."""
        task = state.tasks.get(command.device)
        # Synchronous rounds count attempts per round: the command knows them.
        if task is None or task.basis is None:
            is_stalled = command.attempt > MAX_ATTEMPTS
        # A first offer is no repetition; a deadline ends the round by itself.
        elif command.attempt == 1 or state.deadline is not None:
            is_stalled = False
        else:
            self._offers_without_update[command.device] += 1
            is_stalled = self._offers_without_update[command.device] >= MAX_ATTEMPTS
        if is_stalled:
            raise PlanError(
                f"no device finished round {command.round} in {MAX_ATTEMPTS} attempts",
                got=refusal or None,
                hint="" if refusal else "Raise deadline_s, or ask for less training.",
            )


def standstill_reason(state: State, job: Job | None = None) -> str:
    """The reason why no round begins, with advice if this job's training diverged."""
    excluded = [(name, d.excluded) for name, d in state.devices.items() if d.excluded]
    if not excluded:
        return "Fewer devices can take part than job.devices asks for."
    advice_text = diagnose_losses([], [d.excluded_by for d in state.devices.values()], job.to_dict()) if job else ""
    name, reason = min(excluded)
    further_devices = f" (and {quantity(len(excluded) - 1, 'other')})" if len(excluded) > 1 else ""
    return f"Device {name}{further_devices}: {reason}" + (
        f". {advice_text[:1].upper()}{advice_text[1:]}" if advice_text else ""
    )
