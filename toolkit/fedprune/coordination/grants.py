"""What a device trains in a round: how much of the model, and how often it goes through its data.

The planner says what each board *can* hold. A strategy with a shared core has boards train less than that for a part
of the job; what narrower steps save, boards spend on more of them, as far as their time and energy allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, State
from fedprune.model.architecture import Architecture, kept_share
from fedprune.planning.costs import costs_at
from fedprune.planning.plan import Plan
from fedprune.strategies import Strategy

Widths = tuple[int, ...]

HALF = 0.5
"""The share of a full-width epoch's MACs that narrower boards are to spend in a round."""

_MOST = 4096


class Grant(NamedTuple):
    """A device's part of the model in a round.

    Attributes:
        widths: Channels per group.
        density: The share of the model that these are.
        work: How often the recipe's epochs are trained.
        mixed: Whether boards of the fleet train different widths.
    """

    widths: Widths
    density: float
    work: int = 1
    mixed: bool = True


class Grants:
    """Decides what devices train, once per round for the fleet; what devices can hold is the allocator's to say."""

    def __init__(self, job: Job, strategy: Strategy, architecture: Architecture, state: State) -> None:
        self._job, self._core, self._architecture, self._state = job, strategy.core, architecture, state
        self._round = 0
        self._widths: Widths = ()
        self._widest: Widths = ()
        self._density, self._mixed = 1.0, True
        self._macs: dict[Widths, int] = {}
        self._repeats: dict[tuple[Mapping[str, Any], Widths], int] = {}

    def of(self, device: Device) -> Grant:
        """What a device trains in the present round."""
        if self._core is None:
            return Grant(device.widths, device.density)
        if self._round != self._state.round:
            self._begin_round()
        widths, density = self._least(device)
        return Grant(widths, density, self._work(device, widths), self._mixed)

    @property
    def widest(self) -> Widths:
        """The channels per group that some board trains in the present round; empty where that isn't decided here."""
        if self._core is not None and self._round != self._state.round:
            self._begin_round()
        return self._widest

    def _begin_round(self) -> None:
        core, state = self._core, self._state
        self._round, self._widths, self._density = state.round, (), 1.0
        devices = [d for d in state.devices.values() if d.widths and not d.excluded]
        if core is not None and devices and state.untrained and core.shared_in(state.round, self._job.rounds):
            self._density, self._widths = core.of((d.density, d.widths) for d in devices)
        trained = {self._least(d)[0] for d in devices}
        self._mixed, self._widest = len(trained) > 1, tuple(map(max, zip(*trained, strict=True)))

    def _least(self, device: Device) -> tuple[Widths, float]:
        """The lesser of what a device can hold and the core."""
        widths = tuple(map(min, device.widths, self._widths)) if self._widths else device.widths
        if widths == device.widths:
            return widths, device.density
        return widths, self._density if widths == self._widths else kept_share(self._architecture, widths)

    def _work(self, device: Device, widths: Widths) -> int:
        most = 1 if self._core is None or not widths else self._core.work
        if most == 1:
            return 1
        wanted = round(HALF * self._training_macs(self._architecture.sizes) / self._training_macs(widths))
        return max(1, min(most, wanted, most if device.plan is None else self._fitting(device.plan, device, widths)))

    def _fitting(self, plan: Mapping[str, Any], device: Device, widths: Widths) -> int:
        """How often a device's plan has time and energy for the training at these widths."""
        key = (plan, widths)
        if key not in self._repeats:
            share = self._training_macs(widths) / self._training_macs(device.widths)
            self._repeats[key] = math.floor(Plan.from_dict(plan).repeats(share))
            if len(self._repeats) > _MOST:
                del self._repeats[next(iter(self._repeats))]
        return self._repeats[key]

    def _training_macs(self, widths: Widths) -> int:
        if widths not in self._macs:
            self._macs[widths] = max(1, costs_at(self._architecture, widths).training_macs)
            if len(self._macs) > _MOST:
                del self._macs[next(iter(self._macs))]
        return self._macs[widths]
