"""Plans the width of each device's model from its hardware profile, and corrects the plan by its measured rounds.

A plan predicts the time and memory of a round. What the device then measures corrects the prediction: by a factor for
times, and one for memory (`planning.cost_prediction.Correction`). Devices of one kind share a plan while their
corrections are equal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedprune.coordination.round_prediction import predict_round
from fedprune.core.bounded_cache import BoundedCache
from fedprune.core.errors import FedpruneError, PlanError, StrategyError
from fedprune.jobs.job import Job
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune.model.architecture import Architecture, kept_share
from fedprune.model.recipe import Recipe
from fedprune.planning.correction import NO_CORRECTION, Correction
from fedprune.planning.plan_search import PlanSearch
from fedprune.planning.prediction import Prediction
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.width_plan import MEMORY, AskedShare, WidthPlan
from fedprune.strategies import Strategy
from fedprune.strategies.allocation import Allocator, Capacity, Fleet

# What to do where a method needs the whole model, and a board can't hold it.
WHOLE_HINT = " The strategy needs the whole model on every board: with density = 1 each gets what it can hold."


@dataclass(frozen=True, eq=False)
class _SharedPlan:
    """A plan that devices share, or the error of planning it.

    Attributes:
        recipes: The recipes that planning used, by widths: the plan holds for a device whose own are the same.
    """

    recipes: Mapping[tuple[int, ...], Recipe]
    error: FedpruneError | None = None
    plan: PackedJson | None = None
    widths: tuple[int, ...] = ()
    density: float = 1.0


class WidthPlanner:
    """Plans a job's devices, by the recipes (settings of local training) that its strategy is going to send them."""

    def __init__(self, job: Job, strategy: Strategy, architecture: Architecture, frozen: Collection[str] = ()) -> None:
        self.job = job
        self.strategy = strategy
        self.architecture = architecture
        self.frozen = frozen
        # Per device its share as assigned last, what it was assigned for, and its capacity: plans may be put away.
        self._shares: dict[str, tuple[float, tuple[int, ...]]] = {}
        self._asked_shares: dict[str, tuple[JobDevice, AskedShare]] = {}
        self._capacities: dict[str, tuple[JobDevice, Capacity]] = {}
        self._profiles: dict[str, tuple[dict[str, Any], HardwareProfile]] = {}
        self._plans = BoundedCache[Hashable, _SharedPlan]()
        self._plans_by_body = BoundedCache[Mapping[str, Any], WidthPlan]()
        self._predictions = BoundedCache[Hashable, Prediction]()

    def plan(self, name: str, device: JobDevice, asked: AskedShare | None = None) -> None:
        """Give a device its plan and widths, or the reason why it takes no part: all that its board can hold or, if a
        strategy asks for a share, no more than that.

        Measured rounds never exclude a device. If it is too slow at every width, it is planned without the measured
        times; if its memory is too small at every width, it gets the narrowest. Raises `ConfigError` if the job's
        recipe has settings that don't go with its strategy's.
        """
        device.plan, device.widths, device.density = None, (), 1.0
        device.excluded = device.excluded if device.excluded_by else ""
        self._recipe(name, device, self.architecture.sizes)
        try:
            # What the rounds measured holds first; then only its memory, where no width is fast enough; then neither.
            correction = Correction(**device.correction)
            corrections = [correction, correction.without_times(), NO_CORRECTION]
            self._assign(name, device, self._fitting_plan(name, device, asked, *corrections))
        except StrategyError:  # no device's fault
            raise
        except FedpruneError as error:
            device.excluded = str(error) + (WHOLE_HINT if asked is not None and asked.whole else "")

    def grant(self, name: str, device: JobDevice, share: AskedShare) -> None:
        """As `fedprune.strategies.allocation.Ceiling.grant`. A plan holds until the device announces itself anew."""
        known, asked = self._asked_shares.get(name, (None, None))
        if known is not device or asked != share or self._shares.get(name) != (device.density, device.widths):
            self.plan(name, device, share)
            self._asked_shares[name] = device, share

    def capacity(self, name: str, device: JobDevice, *, masks_elements: bool) -> Capacity:
        """As `fedprune.strategies.allocation.Ceiling.capacity`. What rounds taught is left out: a device whose
        correction changes would change places with others, which would get other channels for it."""
        known, capacity = self._capacities.get(name, (None, (0.0, -math.inf)))
        if known is device:  # one that announces itself anew is another object
            return capacity
        # Boards of a kind are equally fast, whatever they measured and however many samples they have.
        batch, whole = self.job.recipe.batch_size, self.architecture.sizes
        typical_device = JobDevice(session=0, online=True, profile=device.profile, probe=None, samples=batch)
        try:
            plan = self._cached_plan(name, device, AskedShare(1.0, whole, masks_elements), NO_CORRECTION)
            costs = predict_round(self.job, self.strategy, self.architecture, "", typical_device, whole, 1.0, batch)
            capacity = 0.0 if plan.error else plan.density, -costs.step_s
        except StrategyError:
            raise
        except FedpruneError:  # what it says of itself can't be read: `grant` says so
            pass
        self._capacities[name] = device, capacity
        return capacity

    def bind(self, name: str, device: JobDevice, *, masks_elements: bool) -> None:
        """Bring a device whose widths were set past `grant` under its plan."""
        if device.widths and not device.excluded and self._shares.get(name) != (device.density, device.widths):
            self.grant(name, device, AskedShare(device.density, device.widths, masks_elements))

    def keep_correction(self, former: JobDevice | None, device: JobDevice) -> None:
        """Give a device that announced itself what its rounds taught before, as far as that still holds."""
        if former is not None and former.profile == device.profile:
            # What rounds taught belongs to the measurement that it corrects.
            latencies = ((probe or {}).get("latency") for probe in (former.probe, device.probe))
            if former.probe == device.probe or next(latencies) == next(latencies):
                device.correction = former.correction

    def plan_again(self, name: str, former: JobDevice | None, device: JobDevice) -> None:
        """Plan a device that announced itself; its former plan holds if nothing has changed."""
        inputs = (device.profile, device.probe, device.samples, device.codecs)
        former_inputs = None if former is None else (former.profile, former.probe, former.samples, former.codecs)
        if former is not None and former.widths and former_inputs == inputs:
            device.plan, device.widths, device.density = former.plan, former.widths, former.density
        else:
            self.plan(name, device)

    def learn(self, name: str, device: JobDevice, task: DeviceTask) -> None:
        """Correct a device's predicted times and memory by a round's measured ones; plan again where they were far
        off."""
        # A round in other parts of a batch says nothing of the memory that this plan takes.
        if device.plan is None or device.accumulate != task.accumulate:
            return
        if device.plan not in self._plans_by_body:  # devices share plans
            self._plans_by_body[device.plan] = WidthPlan.from_dict(device.plan)
        former_plan = self._plans_by_body[device.plan]
        limit = former_plan.limit_of(MEMORY).limit
        former_correction, expected = former_plan.correction, former_plan.prediction
        if device.widths != task.widths:
            expected = self._prediction_for_task(name, device, task, former_plan)
        # A device that is asked again may have trained before: only the first attempt's time is that of its steps.
        is_clocked = task.seconds is not None and task.seconds > 0 and task.steps and task.attempt == 1
        clocked_step_s = (task.seconds or 0.0) / task.steps if is_clocked else math.inf
        correction = Correction(**device.correction).corrected_by(
            expected, former_correction, task.metrics, limit, clocked_step_s
        )
        device.correction = vars(correction)
        peak_memory = task.metrics.get("peak_memory_bytes", 0.0)
        exceeds_memory = peak_memory > limit and correction != former_correction
        if not exceeds_memory and not correction.differs_from(former_correction, former_plan.prediction):
            return
        corrections = [correction, correction.without_times()] if exceeds_memory else [correction]
        try:
            self._assign(name, device, self._fitting_plan(name, device, former_plan.asked, *corrections))
        except StrategyError:
            raise
        except FedpruneError:  # too slow at any width: it has delivered all the same, and keeps its plan
            return

    def _prediction_for_task(self, name: str, device: JobDevice, task: DeviceTask, plan: WidthPlan) -> Prediction:
        """The prediction that a device's plan would have made for the widths of a task, where these are others."""
        key = (device.plan, task.widths, task.samples)
        if key not in self._predictions:
            self._predictions[key] = predict_round(
                self.job,
                self.strategy,
                self.architecture,
                name,
                device,
                task.widths,
                kept_share(self.architecture, task.widths),
                task.samples,
                accumulate=task.accumulate,
                correction=plan.correction,
                frozen=self.frozen,
            )
        return self._predictions[key]

    def _assign(self, name: str, device: JobDevice, shared_plan: _SharedPlan) -> None:
        """Set a device's plan, widths and density; the strategy's allocator and scaling go by the density, too."""
        device.plan, device.widths, device.density = shared_plan.plan, shared_plan.widths, shared_plan.density
        self._shares[name] = device.density, device.widths

    def _recipe(self, name: str, device: JobDevice, widths: tuple[int, ...]) -> Recipe:
        """The device's recipe at these widths."""
        density = kept_share(self.architecture, widths)
        return self.strategy.planned_recipe(self.job, name, widths, density, device.samples)

    def _fitting_plan(
        self, name: str, device: JobDevice, asked: AskedShare | None, correction: Correction, *fallbacks: Correction
    ) -> _SharedPlan:
        """The plan by the first correction with which a width fits. Raises the last error if no width does."""
        shared_plan = self._cached_plan(name, device, asked, correction)
        if shared_plan.error is None:
            return shared_plan
        if isinstance(shared_plan.error, PlanError) and set(fallbacks) - {correction}:
            return self._fitting_plan(name, device, asked, *fallbacks)
        # The error is kept for other devices; a traceback would keep the frames of this call alive with it.
        raise shared_plan.error.with_traceback(None)

    def _cached_plan(
        self, name: str, device: JobDevice, asked: AskedShare | None, correction: Correction
    ) -> _SharedPlan:
        """The plan of another device like this one whose recipes agree, for the whole model and as planned."""
        device.profile, profile = self._profile(device.profile)
        key = (id(profile), device.probe, device.samples, tuple(device.codecs), asked, correction)
        shared_plan = self._plans.pop(key, None)
        if shared_plan is None or any(self._recipe(name, device, w) != r for w, r in shared_plan.recipes.items()):
            shared_plan = self._find_plan(name, device, profile, asked, correction)
        self._plans[key] = shared_plan
        return shared_plan

    def _profile(self, body: dict[str, Any]) -> tuple[dict[str, Any], HardwareProfile]:
        """A profile's JSON and the parsed profile, shared by devices of one kind: copies would fill the memory."""
        shared_profile = self._profiles.get(str(body.get("name")))
        if shared_profile is None or shared_profile[0] != body:
            shared_profile = self._profiles[str(body.get("name"))] = (body, HardwareProfile.from_dict(body))
            # Keys hold the identity of a profile's object, which another one may get after it is freed.
            self._plans.clear()
        return shared_profile

    def _find_plan(
        self, name: str, device: JobDevice, profile: HardwareProfile, asked: AskedShare | None, correction: Correction
    ) -> _SharedPlan:
        full_widths = self.architecture.sizes
        try:
            plan = PlanSearch(
                self.architecture,
                profile,
                partial(self._recipe, name, device),
                device.samples,
                byte_budget=self.job.byte_budget or None,
                deadline_s=self.job.deadline_s,
                energy_budget=self.job.energy_budget or None,
                probe=None if device.probe is None else ProbeReport.from_dict(device.probe),
                correction=correction,
                frozen=self.frozen,
                least_channels=self.strategy.min_channels,
                asked=asked,
                codecs=self.strategy.codecs(self.job, device.profile.get("name"), device.codecs),
            ).search()
        except StrategyError:
            raise
        except FedpruneError as error:
            return _SharedPlan({full_widths: self._recipe(name, device, full_widths)}, error=error)
        recipes = {w: self._recipe(name, device, w) for w in (full_widths, plan.widths)}
        density = kept_share(self.architecture, plan.widths) if asked is None else plan.density
        return _SharedPlan(recipes, plan=PackedJson(plan.to_dict()), widths=plan.widths, density=density)


class PlannedWidths(Allocator):
    """The allocator of jobs where neither strategy nor job asks for a share: each device gets what its board holds."""

    def __init__(self, planner: WidthPlanner) -> None:
        self._planner = planner

    def admit(self, fleet: Fleet, name: str, former: JobDevice | None) -> None:
        self._planner.plan_again(name, former, fleet.state.devices[name])
