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

PLANS = 4096
"""Plans that are remembered: boards of one kind with as many samples have one, unless they have measured themselves."""


@dataclass(frozen=True, eq=False)
class _Made:
    """A plan that devices share, or the error of planning it, and the recipes that planning used, by widths."""

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
            learnt = Correction(**device.correction)
            self._give(device, self._planned(name, device, learnt, learnt.of_memory(), NO_CORRECTION))
        except StrategyError:  # no device's fault
            raise
        except FedpruneError as error:
            device.excluded = str(error)

    def replace(self, name: str, known: Device | None, device: Device) -> None:
        """Plan a device that announced itself, with what still holds of what was known of it."""
        if known is not None and known.profile == device.profile and _as_fast(known, device):
            device.correction = known.correction
        said = (device.profile, device.probe, device.samples, device.codecs)
        before = None if known is None else (known.profile, known.probe, known.samples, known.codecs)
        if known is not None and known.widths and before == said:
            device.plan, device.widths, device.density = known.plan, known.widths, known.density
        else:
            self.plan(name, device)

    def learn(self, name: str, device: Device, task: Task) -> None:
        """Let a round's own times and memory correct a device's predicted ones; plan again where they were far off."""
        if device.plan is None or device.accumulate != task.accumulate:
            return
        before = self._plan_of(device.plan)
        room = before.limit(MEMORY).limit
        expected = before.prediction if device.widths == task.widths else self._predicted(name, device, task, before)
        learnt = Correction(**device.correction).after(expected, before.correction, task.metrics, room)
        device.correction = vars(learnt)
        overran = task.metrics.get("peak_memory_bytes", 0.0) > room and learnt != before.correction
        if not overran and not learnt.moved(before.correction, before.prediction):
            return
        try:
            self._give(device, self._planned(name, device, learnt, *([learnt.of_memory()] if overran else [])))
        except StrategyError:
            raise
        except FedpruneError:  # too slow at any width: it delivered all the same, and continues as it is
            return

    def _predicted(self, name: str, device: Device, task: Task, made: Plan) -> Prediction:
        """What a device's plan would have predicted for the other widths of a task."""
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
                correction=made.correction,
                frozen=self.frozen,
            )
            forget_first(self._predictions)
        return self._predictions[key]

    def _plan_of(self, body: Mapping[str, Any]) -> Plan:
        """A plan, from what devices share of it."""
        if body not in self._read:
            self._read[body] = Plan.from_dict(body)
            forget_first(self._read)
        return self._read[body]

    def _give(self, device: Device, made: _Made) -> None:
        """A plan's widths; strategies that go by a device's density (a pull, a scaler) need to know their share."""
        device.plan, device.widths, device.density = made.plan, made.widths, made.density

    def _recipe(self, name: str, device: Device, widths: tuple[int, ...]) -> Recipe:
        """The device's recipe at these widths."""
        return self.strategy.planned_recipe(
            self.job, name, widths, kept_share(self.architecture, widths), device.samples
        )

    def _planned(self, name: str, device: Device, correction: Correction, *others: Correction) -> _Made:
        """The plan by the first of the corrections by which one fits."""
        made = self._remembered(name, device, correction)
        if made.error is None:
            return made
        if isinstance(made.error, PlanError) and set(others) - {correction}:
            return self._planned(name, device, *others)
        raise made.error.with_traceback(None)

    def _remembered(self, name: str, device: Device, correction: Correction) -> _Made:
        """The plan of another device like this one whose recipes agree, for the whole model and as planned."""
        device.profile, profile = self._profile(device.profile)
        key = (id(profile), device.probe, device.samples, tuple(device.codecs), correction)
        made = self._plans.pop(key, None)
        if made is None or any(self._recipe(name, device, w) != r for w, r in made.recipes.items()):
            made = self._made(name, device, profile, correction)
        self._plans[key] = made
        forget_first(self._plans)
        return made

    def _profile(self, body: dict[str, Any]) -> tuple[dict[str, Any], HardwareProfile]:
        """A profile as devices share it, as JSON and checked."""
        known = self._profiles.get(str(body.get("name")))
        if known is None or known[0] != body:
            known = self._profiles[str(body.get("name"))] = (body, HardwareProfile.from_dict(body))
            self._plans.clear()
        return known

    def _made(self, name: str, device: Device, profile: HardwareProfile, correction: Correction) -> _Made:
        whole = self.architecture.sizes
        try:
            made = PlanSearch(
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
            return _Made({whole: self._recipe(name, device, whole)}, error)
        recipes = {w: self._recipe(name, device, w) for w in (whole, made.widths)}
        return _Made(recipes, None, PackedJson(made.to_dict()), made.widths, kept_share(self.architecture, made.widths))


class PlannedWidths(Allocator):
    """The allocator of jobs whose strategy has none: the planner."""

    def __init__(self, planner: WidthPlanner) -> None:
        self._planner = planner

    def admit(self, fleet: Fleet, name: str, known: Device | None) -> None:
        self._planner.replace(name, known, fleet.state.devices[name])

    def learn(self, fleet: Fleet, name: str, task: Task, seconds: float | None) -> None:
        self._planner.learn(name, fleet.state.devices[name], task)


def _as_fast(known: Device, device: Device) -> bool:
    """Whether the measurement that a correction belongs to is the same."""
    if known.probe == device.probe:
        return True
    return (known.probe or {}).get("latency") == (device.probe or {}).get("latency")


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
    """Forget what was remembered first, beyond `PLANS`."""
    if len(remembered) > PLANS:
        del remembered[next(iter(remembered))]
