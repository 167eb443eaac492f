"""Decides what a device trains in a round: how much of the model, and how often it goes through its data.

The planner says how much of the model each board *can* hold. A strategy with a shared *core* (the width that most
boards train together) has boards train less than that for a part of the job. Narrower steps take less time, which
boards spend on more steps, as far as their time and energy allow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedprune.coordination.job_end import spent_share_after_round
from fedprune.coordination.round_prediction import predict_round
from fedprune.core.bounded_cache import BoundedCache
from fedprune.core.errors import ProfileError
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, State
from fedprune.model.architecture import Architecture, kept_share
from fedprune.planning.costs import costs_at
from fedprune.planning.prediction import Prediction
from fedprune.planning.width_plan import WidthPlan
from fedprune.strategies import Strategy

Widths = tuple[int, ...]

# The share of the whole model's MACs that narrower boards are to spend: at half the channels twice the epochs, with
# which a core learns as much in a round as FedAvg does.
NARROW_WORK_SHARE = 0.5

# The most epochs that a recipe accepts.
MAX_EPOCHS = 10_000

# How many rounds a board that is away may have left out, of those that ask it, and still counts for the fleet's widths:
# links drop for a round or two, while boards that are gone for good must not decide what the others train.
MAX_ROUNDS_AWAY = 3


class Grant(NamedTuple):
    """A device's part of the model in a round.

    Attributes:
        widths: Channels per group.
        density: The share of the model that these are.
        work: How often the recipe's epochs are trained.
    """

    widths: Widths
    density: float
    work: int = 1


class Grants:
    """Decides what devices train, once per round for the fleet. What devices can hold, the allocator decides."""

    def __init__(
        self, job: Job, strategy: Strategy, architecture: Architecture, state: State, *, asks_alike: bool = False
    ) -> None:
        self._asks_alike = asks_alike
        self._job, self._strategy, self._architecture, self._state = job, strategy, architecture, state
        self._core = strategy.core
        self._recipe = job.training_recipe  # made anew whenever a job is asked, and needed for every device of a round
        self._macs_by_widths = BoundedCache[Widths, int]()
        self._step_seconds = BoundedCache[tuple[str, Widths], tuple[Mapping[str, Any], float]]()
        self._repeats_by_plan = BoundedCache[tuple[Mapping[str, Any], Widths], float]()

    def begin_round(self) -> None:
        """Decide what the fleet trains in the round that begins, of number `State.round`.

        Boards that have grown have no core again.
        """
        self._state.untrained = self._is_shared
        self._decide_for_fleet()

    def grant_of(self, device: JobDevice) -> Grant:
        """What a device trains in the present round."""
        if self._core is None:
            return Grant(device.widths, device.density)
        widths, density = self._narrow_to_core(device.widths, device.density)
        return Grant(widths, density, self._work_of(device, widths))

    @property
    def core(self) -> Widths:
        """The widths that the fleet shares in the present round; empty where each board trains all that it can hold."""
        return tuple(self._state.core_widths) if self._core is not None else ()

    def describe(self) -> str:
        """A line for people on what the fleet trains in the present round; empty where strategies leave that alone."""
        if self._core is None:
            return ""
        if self.core:
            core_density, devices = self._state.core_density, self._present_devices
            share = sum(d.density >= core_density for d in devices) / max(1, len(devices))
            if core_density == share == 1:
                return "boards train the whole model"
            core_share = f"{core_density:.3g} of the model's channels"
            return f"boards share a core: they train at most {core_share}, which {share:.0%} of them can hold"
        return "each board trains all that it can hold"

    @property
    def _is_shared(self) -> bool:
        """Whether the fleet shares a core in the present round."""
        core, state = self._core, self._state
        if core is None or not state.untrained:
            return False
        return core.is_shared_in(state.round, self._job.rounds, spent_share_after_round(self._job, state))

    @property
    def _present_devices(self) -> list[JobDevice]:
        """The devices that decide what the fleet trains: connected, or with an update that counted lately."""
        first_round = max(1.0, self._state.round - MAX_ROUNDS_AWAY / self._job.participation)
        devices = (d for d in self._state.devices.values() if d.widths and not d.excluded)
        return [d for d in devices if d.online or d.last_counted_round >= first_round]

    def _decide_for_fleet(self) -> None:
        """Decide on the core by what the fleet's devices can hold."""
        state = self._state
        state.core_widths, state.core_density, state.longest_s = [], 1.0, 0.0
        if self._core is None:
            return
        devices = self._present_devices
        if not devices:
            return
        width_counts = Counter((d.density, d.widths) for d in devices)
        state.core_density, core = self._core.choose_core(width_counts)
        if self._is_shared:
            state.core_widths = list(core)
        min_density = self._core.min_density(width_counts)
        # As in FedAvg. It limits the work of narrower boards: where steps of a small net take as long at any width,
        # more of them would make rounds longer than FedAvg's.
        state.longest_s = max(
            self._training_s(d, self._architecture.sizes) for d in devices if d.density >= min_density
        )

    def _narrow_to_core(self, widths: Widths, density: float) -> tuple[Widths, float]:
        """The smaller of what a device can hold and the core, group by group."""
        core = self.core
        narrowed = tuple(map(min, widths, core)) if core else widths
        if narrowed == widths:
            return widths, density
        return narrowed, self._state.core_density if narrowed == core else kept_share(self._architecture, narrowed)

    def _work_of(self, device: JobDevice, widths: Widths) -> int:
        if self._core is None or not widths or self._asks_alike:
            return 1
        epochs_for_share = round(
            NARROW_WORK_SHARE * self._training_macs(self._architecture.sizes) / self._training_macs(widths)
        )
        max_work = min(self._core.max_work, epochs_for_share, MAX_EPOCHS // self._recipe.epochs)
        if max_work <= 1:
            return 1
        seconds, longest = self._training_s(device, widths), self._state.longest_s
        work_in_time = round(min(max_work, longest / seconds)) if seconds and longest else max_work
        return max(1, math.floor(min(work_in_time, self._planned_repeats(device, widths))))

    def _planned_repeats(self, device: JobDevice, widths: Widths) -> float:
        """How many times the training at these widths fits the time and energy of a device's plan."""
        if device.plan is None:
            return math.inf
        key = (device.plan, widths)
        if key not in self._repeats_by_plan:
            share = 1.0
            if widths != device.widths:
                share = self._prediction(device, widths).train_s / self._prediction(device, device.widths).train_s
            self._repeats_by_plan[key] = WidthPlan.from_dict(device.plan).repeats(share)
        return self._repeats_by_plan[key]

    def _training_s(self, device: JobDevice, widths: Widths) -> float:
        """Seconds of the recipe's training at these widths on a board of the device's kind, by its profile; 0 where
        there is no such profile. Boards' own measurements are left out: reading them all would take a large fleet
        longer than it gains."""
        key = (str(device.profile.get("name")), widths)
        profile, step_s = self._step_seconds.get(key, (None, 0.0))
        if profile != device.profile:
            # A step of a whole batch, whatever samples the device has: boards of a kind are alike in any order.
            typical_device = JobDevice(
                session=0, online=True, profile=device.profile, probe=None, samples=self._recipe.batch_size
            )
            try:
                step_s = self._prediction(typical_device, widths).step_s
            except ProfileError:
                step_s = 0.0
            self._step_seconds[key] = (device.profile, step_s)
        return step_s * self._recipe.steps(device.samples)

    def _prediction(self, device: JobDevice, widths: Widths) -> Prediction:
        density = kept_share(self._architecture, widths)
        return predict_round(self._job, self._strategy, self._architecture, "", device, widths, density, device.samples)

    def _training_macs(self, widths: Widths) -> int:
        if widths not in self._macs_by_widths:
            self._macs_by_widths[widths] = max(1, costs_at(self._architecture, widths).training_macs)
        return self._macs_by_widths[widths]
