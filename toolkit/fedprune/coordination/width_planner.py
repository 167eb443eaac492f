"""The width of each device's model, planned from its profile and corrected by its measured rounds."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedprune.core.errors import FedpruneError, PlanError, StrategyError
from fedprune.jobs.job import Job
from fedprune.jobs.packed_json import PackedJson
from fedprune.jobs.state import Device, Task
from fedprune.model.architecture import Architecture, kept_share, widths_at, widths_with_least
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import NO_CORRECTION, Correction, Prediction, predict
from fedprune.planning.plan import MEMORY, Plan, PlanSearch
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.strategies import Strategy
from fedprune.strategies.allocation import Allocator, Fleet

# Plans that are remembered. Boards of one kind with as many samples share a plan, unless they have measured themselves;
# a fleet whose boards all have would otherwise fill the memory.
PLANS = 4096


@dataclass(frozen=True, eq=False)
class _Made:
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
    """Plans a job's devices, by the recipes that its strategy is going to ask them to train by."""

    def __init__(self, job: Job, strategy: Strategy, architecture: Architecture, frozen: Collection[str] = ()) -> None:
        self.job = job
        self.strategy = strategy
        self.architecture = architecture
        self.frozen = frozen
        self._fixed: tuple[int, ...] = ()
        if job.density:
            self._fixed = widths_with_least(architecture, widths_at(architecture, job.density), strategy.least_channels)
        self._profiles: dict[str, tuple[dict[str, Any], HardwareProfile]] = {}
        self._plans: dict[Hashable, _Made] = {}
        self._read: dict[Mapping[str, Any], Plan] = {}
        self._predictions: dict[Hashable, Prediction] = {}

    def plan(self, name: str, device: Device) -> None:
        """Give a device its plan and widths, or the reason why it takes no part.

        What a device's rounds taught never excludes it. One that looks too slow for any width is planned without the
        times that they taught; one whose memory looks too small for any gets the narrowest. Raises `ConfigError` if the
        job's recipe has settings that don't go with its strategy's, which is no fault of a device.
        """
        device.plan, device.widths, device.density, device.excluded = None, (), 1.0, ""
        if not self.job.density:
            self._recipe(name, device, self.architecture.sizes)
        try:
            if self.job.density:
                device.widths, device.density = self._fixed, self.job.density
                return
            correction = Correction(**device.correction)
            self._give(device, self._planned(name, device, correction, correction.of_memory(), NO_CORRECTION))
        except StrategyError:  # no device's fault
            raise
        except FedpruneError as error:
            device.excluded = str(error)

    def replace(self, name: str, former: Device | None, device: Device) -> None:
        """Plan a device that announced itself, keeping what still holds of its former plan and correction."""
        if former is not None and former.profile == device.profile and _as_fast(former, device):
            device.correction = former.correction
        inputs = (device.profile, device.probe, device.samples, device.codecs)
        former_inputs = None if former is None else (former.profile, former.probe, former.samples, former.codecs)
        if former is not None and former.widths and former_inputs == inputs:
            device.plan, device.widths, device.density = former.plan, former.widths, former.density
        else:
            self.plan(name, device)

    def learn(self, name: str, device: Device, task: Task) -> None:
        """Correct a device's predicted times and memory by a round's measured ones; plan again where they were far
        off."""
        # A round in other parts of a batch says nothing of the memory that this plan takes.
        if device.plan is None or device.accumulate != task.accumulate:
            return
        former_plan = self._plan_of(device.plan)
        room = former_plan.limit(MEMORY).limit
        expected = (
            former_plan.prediction if device.widths == task.widths else self._predicted(name, device, task, former_plan)
        )
        correction = Correction(**device.correction).after(expected, former_plan.correction, task.metrics, room)
        device.correction = vars(correction)
        overran = task.metrics.get("peak_memory_bytes", 0.0) > room and correction != former_plan.correction
        if not overran and not correction.moved(former_plan.correction, former_plan.prediction):
            return
        try:
            self._give(device, self._planned(name, device, correction, *([correction.of_memory()] if overran else [])))
        except StrategyError:
            raise
        except FedpruneError:  # too slow at any width: it delivered all the same, and continues as it is
            return

    def _predicted(self, name: str, device: Device, task: Task, plan: Plan) -> Prediction:
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
            forget_first(self._predictions)
        return self._predictions[key]

    def _plan_of(self, body: Mapping[str, Any]) -> Plan:
        """A plan read from its JSON, which devices share."""
        if body not in self._read:
            self._read[body] = Plan.from_dict(body)
            forget_first(self._read)
        return self._read[body]

    def _give(self, device: Device, shared_plan: _Made) -> None:
        """Set a device's plan, and with it widths and density: strategies go by the latter, too (a pull, a scaler)."""
        device.plan, device.widths, device.density = shared_plan.plan, shared_plan.widths, shared_plan.density

    def _recipe(self, name: str, device: Device, widths: tuple[int, ...]) -> Recipe:
        """The device's recipe at these widths."""
        return self.strategy.planned_recipe(
            self.job, name, widths, kept_share(self.architecture, widths), device.samples
        )

    def _planned(self, name: str, device: Device, correction: Correction, *fallbacks: Correction) -> _Made:
        """The plan by the first of the corrections with which a width fits. Raises the last error if none does."""
        shared_plan = self._remembered(name, device, correction)
        if shared_plan.error is None:
            return shared_plan
        if isinstance(shared_plan.error, PlanError) and set(fallbacks) - {correction}:
            return self._planned(name, device, *fallbacks)
        # The error is kept for other devices; a traceback would keep the frames of this call alive with it.
        raise shared_plan.error.with_traceback(None)

    def _remembered(self, name: str, device: Device, correction: Correction) -> _Made:
        """The plan of another device like this one whose recipes agree, for the whole model and as planned."""
        device.profile, profile = self._profile(device.profile)
        key = (id(profile), device.probe, device.samples, tuple(device.codecs), correction)
        shared_plan = self._plans.pop(key, None)
        if shared_plan is None or any(self._recipe(name, device, w) != r for w, r in shared_plan.recipes.items()):
            shared_plan = self._made(name, device, profile, correction)
        self._plans[key] = shared_plan
        forget_first(self._plans)
        return shared_plan

    def _profile(self, body: dict[str, Any]) -> tuple[dict[str, Any], HardwareProfile]:
        """A profile as JSON and checked; devices of one kind share both, since a fleet's own copies fill a memory."""
        shared_profile = self._profiles.get(str(body.get("name")))
        if shared_profile is None or shared_profile[0] != body:
            shared_profile = self._profiles[str(body.get("name"))] = (body, HardwareProfile.from_dict(body))
            # Keys hold the identity of a profile's object, which another one may get after it is freed.
            self._plans.clear()
        return shared_profile

    def _made(self, name: str, device: Device, profile: HardwareProfile, correction: Correction) -> _Made:
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
                least_channels=self.strategy.least_channels,
                codecs=self.strategy.codecs(self.job, device.profile.get("name"), device.codecs),
            ).plan()
        except StrategyError:
            raise
        except FedpruneError as error:
            return _Made({full_widths: self._recipe(name, device, full_widths)}, error=error)
        recipes = {w: self._recipe(name, device, w) for w in (full_widths, plan.widths)}
        return _Made(
            recipes,
            plan=PackedJson(plan.to_dict()),
            widths=plan.widths,
            density=kept_share(self.architecture, plan.widths),
        )


class PlannedWidths(Allocator):
    """The allocator of jobs whose strategy has none: each device gets the width that the planner gives it."""

    def __init__(self, planner: WidthPlanner) -> None:
        self._planner = planner

    def admit(self, fleet: Fleet, name: str, former: Device | None) -> None:
        self._planner.replace(name, former, fleet.state.devices[name])

    def learn(self, fleet: Fleet, name: str, task: Task, seconds: float | None) -> None:
        self._planner.learn(name, fleet.state.devices[name], task)


def _as_fast(former: Device, device: Device) -> bool:
    """Whether the measurement that a correction belongs to is the same."""
    if former.probe == device.probe:
        return True
    return (former.probe or {}).get("latency") == (device.probe or {}).get("latency")


def predict_round(
    job: Job,
    strategy: Strategy,
    architecture: Architecture,
    name: str,
    device: Device,
    widths: tuple[int, ...],
    density: float,
    samples: int,
    *,
    accumulate: int = 1,
    correction: Correction = NO_CORRECTION,
    frozen: Collection[str] = (),
) -> Prediction:
    """What a round would cost a device at some widths, by what it has said of itself.

    Raises `FedpruneError` if its profile or probe can't be read, or the strategy has no recipe for it.

    Args:
        density: The share of the model that the widths are.
        accumulate: Parts in which it works through a batch, unless the recipe asks for more.
        correction: What its rounds taught.
        frozen: Tensors that the model's author froze.
    """
    profile = HardwareProfile.from_dict(device.profile)
    return predict(
        architecture,
        widths,
        profile,
        strategy.planned_recipe(job, name, widths, density, samples).in_parts(accumulate),
        samples,
        probe=None if device.probe is None else ProbeReport.from_dict(device.probe),
        correction=correction,
        frozen=frozen,
        codecs=strategy.codecs(job, profile.name, device.codecs),
    )


def forget_first(remembered: dict[Any, Any]) -> None:
    """Forget the oldest entry of a cache that has more than `PLANS`: dictionaries keep the order of insertion."""
    if len(remembered) > PLANS:
        del remembered[next(iter(remembered))]
