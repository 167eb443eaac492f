"""The variants of a job that advice compares: usual strategies, cores and codecs, as far as the fleet can train them.

A core is the width that most boards train together until most of the job is over (`fedprune.strategies.shared_core`). A
codec encodes the weights and updates that are sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.coordination.width_planner import WidthPlanner
from fedprune.core.errors import ConfigError
from fedprune.core.text import first_few
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.initial_values import is_untrained
from fedprune.planning.width_plan import BYTES, LINK, NOTHING_BINDS
from fedprune.strategies import Strategy, compose
from fedprune.updates import CODECS, PLAIN
from fedprune_server.config.layers import setting_value_text
from fedprune_server.simulation.fleet.fleet_tables import read_fleet_tables
from fedprune_server.simulation.fleet.simulated_fleet import FleetPlan
from fedprune_server.simulation.results.record import ALONE

# Lets simulated boards train the whole model where real ones couldn't, so that there is something to compare with.
_NO_LIMITS = {"ignores_plans": True, "deadline_s": 1e7}

_INT8 = {"compression": "int8", "compression_down": "int8"}
_JOBS_BY_VARIANT: Mapping[str, Mapping[str, Any]] = {
    "fedavg": {"strategy": "fedavg", "compression": PLAIN, "compression_down": PLAIN},
    "fedavg-int8": {"strategy": "fedavg", **_INT8},
    "fedprune": {"strategy": "fedprune", **_INT8},
    "one-width": {"strategy": "fedprune", **_INT8, "options": {"core": 1.0}},
    ALONE: {"strategy": ALONE, "ignores_plans": True},  # it sends nothing, and plans count bytes
}


@dataclass(frozen=True)
class Variant:
    """A way to run the job.

    Attributes:
        job: What makes it, as keys of [job].
        misfit: Why boards of this fleet can't train it; empty where all can.
    """

    name: str
    job: Mapping[str, Any]
    misfit: str = ""

    def toml(self) -> str:
        """The lines for the job's file."""
        options = self.job.get("options", {})
        lines = ["[job]"]
        lines += [f"{key} = {setting_value_text(value)}" for key, value in self.job.items() if key != "options"]
        lines += ["", "[job.options]"] if options else []
        return "\n".join([*lines, *(f"{key} = {setting_value_text(value)}" for key, value in options.items())])


def choose_variants(path: Path, plan: FleetPlan) -> tuple[list[Variant], dict[str, ConfigError]]:
    """The variants of a `fleet.toml`'s job, and those that the job's other settings refuse. Of variants that train the
    same, the first is kept. Raises `ConfigError` if all are refused."""
    variants: list[Variant] = []
    refused: dict[str, ConfigError] = {}
    trainings = set()
    trained_before = not is_untrained(plan.model.architecture, plan.model.tensors)
    for name, job_changes in _JOBS_BY_VARIANT.items():
        # Advice is on what boards can hold, which the planner says, and not a density.
        changes = {**job_changes, **({"density": 0.0} if plan.job.density else {})}
        try:
            configured_job = read_fleet_tables(path, {"job": changes}).config.job
            strategy = compose(configured_job)
            devices = _planned_devices(configured_job, strategy, plan)
        except ConfigError as error:
            refused[name] = error
            continue
        # Other strategies are trained at full width everywhere, to have something to compare with; what boards can't
        # hold is said beside it.
        if configured_job.strategy != "fedprune":
            # Why boards can't train the whole model; empty if all can.
            narrow = [
                n
                for n, device in devices.items()
                if (device.excluded or device.density < 1)
                and not (name == ALONE and device.plan and device.plan["bound"] in (LINK, BYTES))
            ]
            bounds = sorted({device.plan["bound"] for device in devices.values() if device.plan} - {NOTHING_BINDS})
            limits = f" ({', '.join(bounds)})" if bounds else ""
            misfit = f"too much for {first_few(narrow, max_names=3)}{limits}" if narrow else ""
            variants.append(Variant(name, {**changes, **_NO_LIMITS} if misfit else changes, misfit))
        elif (training := _training_key(strategy, devices, trained_before=trained_before)) not in trainings:
            trainings.add(training)
            variants.append(Variant(name, changes))
    if not variants:
        raise next(iter(refused.values()))
    return variants, refused


def _planned_devices(job: Job, strategy: Strategy, plan: FleetPlan) -> dict[str, JobDevice]:
    planner = WidthPlanner(job, strategy, plan.model.architecture, plan.model.frozen)
    devices = {
        d.name: JobDevice(1, True, d.profile.to_dict(), None, d.samples, codecs=list(CODECS)) for d in plan.devices
    }
    for name, device in devices.items():
        planner.plan(name, device)
    return devices


def _training_key(strategy: Strategy, devices: Mapping[str, JobDevice], *, trained_before: bool) -> object:
    """A key of what boards train, equal for equal trainings: the core's width, its settings where they decide, or a
    phrase."""
    core, board_counts = strategy.core, Counter((d.density, d.widths) for d in devices.values() if d.widths)
    if core is None or strategy.allocator is not None or not board_counts:
        return core
    if all(density == 1 for density, _ in board_counts):
        return "the whole model"
    return "what each can hold" if trained_before else core.choose_core(board_counts)
