"""A simulation's input: a job with its fleet, data and network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune import __version__
from fedprune.coordination import State, make_coordinator
from fedprune.coordination.round_prediction import predict_round
from fedprune.coordination.width_planner import WHOLE_HINT
from fedprune.core.errors import PlanError, value_text
from fedprune.core.text import first_few
from fedprune.jobs.job import NO_UPDATE_LIMITS, Job
from fedprune.strategies import compose
from fedprune.strategies.user_code_digest import user_code_digest
from fedprune_export.pruning.model import Model
from fedprune_server.executor.server_samples import LabelledSamples
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice, profiles_by_kind
from fedprune_server.simulation.measure import MeasurementHook, measure_settings
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather
from fedprune_server.simulation.results.coverage import PAPERS_SETTING, needs_whole

# Title of the reference run, see `fedavg_job`.
REFERENCE = "FedAvg"

# Strategies that are simulated with a server's limits on updates. All others, a user's own too, have equations that say
# nothing of limits, and are compared by these.
LIMITED_STRATEGIES = ("fedprune", "plain")

# Settings that don't affect the result: what [data] has dealt is in the digests of the devices' samples.
_IRRELEVANT_SETTINGS = ("title", "checkpoints", "data")

_MAX_DIFFERENCES = 5  # settings that a message names; with more of them another run is meant anyway
_MAX_VALUE_LENGTH = 40  # characters of a setting that errors show whole

_MISSING = object()


@dataclass(frozen=True, eq=False)
class Experiment:
    """A simulation's input.

    Attributes:
        evaluation: The server's test samples, or None.
        calibration: The server's samples for batch-norm statistics, or None.
        dropouts: Devices that disconnect during a round.
        weather: Variation of links and boards.
        availability: Windows of time in which devices are connected.
        measure: Additional measurements of the global model.
        checkpoints: Rounds between two saved global models; 0 for none.
        cuda: Whether devices train on an NVIDIA GPU where that works; results differ from a CPU's by rounding.
        partition: The fleet's data as reports show it.
    """

    title: str
    job: Job
    model: Model
    devices: Sequence[VirtualDevice]
    evaluation: LabelledSamples | None = None
    calibration: npt.NDArray[np.float32] | None = None
    dropouts: DropOuts = field(default_factory=DropOuts)
    weather: Weather = field(default_factory=Weather)
    availability: Availability = field(default_factory=Availability)
    measure: MeasurementHook | None = None
    checkpoints: int = 0
    workers: int = 1
    cuda: bool = False
    partition: FleetData = field(default_factory=FleetData)

    @property
    def is_extendable(self) -> bool:
        """Whether a finished run can be continued with more rounds, as if it had had that many from the start.

        An asynchronous job drops unfinished trainings at its end, and a user's strategy may depend on the number of
        rounds.
        """
        schedule = compose(self.job).schedule
        return ":" not in self.job.strategy and not (schedule is not None and schedule.asynchronous)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the run, as JSON types: model, samples and code by their digests."""
        return {
            "fedprune": __version__,
            "strategy_code": user_code_digest(self.job),
            "title": self.title,
            "job": self.job.to_dict(),
            "model": {
                "architecture": self.model.architecture.digest,
                "graph": hashlib.sha256(self.model.graph.to_bytes()).hexdigest(),
            },
            "dropouts": asdict(self.dropouts),
            "weather": asdict(self.weather),
            "availability": asdict(self.availability),
            "measure": measure_settings(self.measure),
            "cuda": self.cuda,
            "checkpoints": self.checkpoints,
            "data": self.partition.settings,
            "evaluation": _samples_digest(*(self.evaluation or ())),
            "calibration": _samples_digest(*(() if self.calibration is None else (self.calibration,))),
            "devices": [
                {
                    "name": d.name,
                    "profile": d.profile.name,
                    "profile_sha256": hashlib.sha256(json.dumps(d.profile.to_dict()).encode()).hexdigest(),
                    "link": asdict(d.profile.link),
                    "samples": d.samples,
                    "data": d.fingerprint,
                    "tampers": d.tamper is not None,
                }
                for d in sorted(self.devices, key=lambda d: d.name)
            ],
        }

    def differences(self, stored_settings: Mapping[str, Any]) -> str:
        """Where another run's settings differ, as `job.recipe.lr (stored 0.05, given 0.1)`; empty for the same run, of
        any number of rounds if it `is_extendable`."""
        # More rounds are no other run if rounds so far don't depend on their number.
        ignored = (*_IRRELEVANT_SETTINGS, *(["job.rounds"] if self.is_extendable else []))
        pairs = _differing_pairs("", stored_settings, json.loads(json.dumps(self.settings())))
        differences = [
            f"{name} (stored {_value_text(a)}, given {_value_text(b)})" for name, a, b in pairs if name not in ignored
        ]
        return first_few(differences, max_names=_MAX_DIFFERENCES)


def plan_boards(experiment: Experiment) -> dict[str, str]:
    """Admit all boards as the first round does. Returns the reason for each that the job leaves out.

    Raises `PlanError` if the others are too few for a round, and `ConfigError` if strategy or options are wrong.
    """
    job, model = experiment.job, experiment.model
    coordinator = make_coordinator(job, model.architecture, State(model=""), model.frozen)
    profiles = profiles_by_kind(experiment.devices)
    for device in sorted(experiment.devices, key=lambda d: d.name):
        coordinator.handle(device.birth(1, profiles[id(device.profile)], is_last_of_batch=False), 0.0)
    reasons = {name: device.excluded for name, device in coordinator.state.devices.items() if device.excluded}
    fitting = len(experiment.devices) - len(reasons)
    if fitting >= job.devices or not reasons:
        return reasons
    ways = [f"devices = {fitting}, to train without the others"] if fitting else []
    if any(map(needs_whole, reasons.values())):
        # A board that trains what it is too slow for would miss every deadline.
        deadline = " with a longer deadline_s" if any("deadline_s" in reason for reason in reasons.values()) else ""
        ways.insert(0, f"{PAPERS_SETTING}{deadline}, as papers do")
    strategy, whole, boards = compose(job), model.architecture.sizes, coordinator.state.devices
    seconds = {
        n: predict_round(job, strategy, model.architecture, n, boards[n], whole, 1.0, boards[n].samples).round_s
        for n in sorted(reasons)
    }
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)  # a deadline for the slowest is one for all of them
    raise PlanError(
        f"{experiment.title}: boards for a round of {job.strategy}",
        expected=f"{job.devices} (devices in [job])",
        got=f"{fitting}, without {first_few(names, max_names=1)}: {reasons[names[0]].removesuffix(WHOLE_HINT)}",
        hint=f"In [job] set {', or '.join(ways)}." if ways else "",
    )


def _samples_digest(*arrays: npt.NDArray[Any]) -> dict[str, Any]:
    """Number and digest of samples, with types and shapes."""
    # Types and shapes, too: the same bytes may be other samples.
    digest = hashlib.sha256(json.dumps([[a.dtype.str, a.shape] for a in arrays]).encode())
    for array in arrays:
        digest.update(array.tobytes())
    return {"samples": len(arrays[0]) if arrays else 0, "sha256": digest.hexdigest()}


def _differing_pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Find every setting whose values differ, down to the keys of tables in tables."""
    old, new = _keyed_by_name(old), _keyed_by_name(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping) and name not in _IRRELEVANT_SETTINGS:
        for key in (*old, *(k for k in new if k not in old)):
            path = f"{name}.{key}" if name else key
            yield from _differing_pairs(path, old.get(key, _MISSING), new.get(key, _MISSING))
    elif old != new:
        yield name, old, new


def _keyed_by_name(value: Any) -> Any:
    """A list of tables as a table by their names; any other value as it is."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        return {str(v["name"]): v for v in value}
    return value


def _value_text(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else value_text(value)


def job_without_limits(job: Job, settings: Mapping[str, Any]) -> Job:
    """The job without the server's limits on updates, which no paper has, except those that its table [job] sets."""
    changes: dict[str, Any] = {k: v for k, v in NO_UPDATE_LIMITS.items() if k not in settings}
    return replace(job, **changes)


def fedavg_job(job: Job) -> Job:
    """The reference run: the whole model on every device, also on those that couldn't hold it, plain local training and
    the plain mean (arXiv:1602.05629).

    It keeps the job's seed, rounds, totals, devices, participation and deadline, and of its recipe the steps, batch,
    loss, optimiser, augmentation, frozen parts and measurement interval.
    """
    return replace(
        job,
        name="fedavg",
        strategy="fedavg",
        options={},
        density=0.0,
        ignores_plans=True,
        scorer="magnitude",
        rule="coverage",
        server_momentum=0.0,
        warmup_rounds=0,
        recipe=job.recipe.plain_training,
    )
