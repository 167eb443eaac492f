"""Reads a `fleet.toml` with its [[devices]] into a plan: the experiment that `fedprune-simulate` runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx, read_source
from fedprune_export.pruning.model import Model
from fedprune_server.config.layers import errors_with_origin, name_source
from fedprune_server.config.track_targets import TrackTarget, track_targets
from fedprune_server.engine.job_inputs import import_choices
from fedprune_server.executor.server_samples import (
    LabelledSamples,
    fit_data,
    form_of,
    load_calibration,
    load_evaluation,
    scale_arrays,
)
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.federation import Federation
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.experiment import (
    LIMITED_STRATEGIES,
    REFERENCE,
    Experiment,
    fedavg_job,
    job_without_limits,
)
from fedprune_server.simulation.fleet.device_table import read_devices
from fedprune_server.simulation.fleet.fleet_tables import FleetTables, SimulationSettings, read_fleet_tables
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import ModelMeasure


@dataclass(frozen=True, eq=False)
class FleetPlan(Experiment):
    """An experiment and its reference.

    Attributes:
        reference: The reference's job on the same devices, or None.
        track: Experiment trackers that get the rounds of both.
    """

    reference: Job | None = None
    track: tuple[TrackTarget, ...] = ()

    def reference_experiment(self) -> Experiment | None:
        return None if self.reference is None else replace(self, title=REFERENCE, job=self.reference, reference=None)


def read_fleet_plan(
    path: Path,
    *,
    reference: bool = False,
    strategy: str | None = None,
    seed: int | None = None,
    rounds: int | None = None,
    changes: Mapping[str, Any] | None = None,
    title: str = "",
    tables: Mapping[str, Any] | None = None,
    model: Model | None = None,
) -> FleetPlan:
    """Read a `fleet.toml` with a [[devices]] table. The table [server] is ignored.

    Args:
        reference: Whether the job is compared with FedAvg.
        strategy: Replaces the job's.
        changes: Tables whose keys replace those of the file.
        title: Replaces the job's name.
        tables: The tables, if they don't come from a file; `path` then appears only in errors.
        model: Replaces that of [model].

    Raises:
        ConfigError: It can't be read, or a key is missing, unknown or wrong; the message names it.
        FedpruneError: Model, data or a profile can't be read; the message names table and key.
    """
    fleet_tables = read_fleet_tables(path, changes, tables, {"strategy": strategy, "seed": seed, "rounds": rounds})
    with errors_with_origin(fleet_tables.layers):
        return _build_plan(fleet_tables, path, title, reference=reference, model=model)


def _build_plan(
    fleet_tables: FleetTables, path: Path, title: str, *, reference: bool, model: Model | None
) -> FleetPlan:
    """The plan of a file's tables; arguments and errors as `read_fleet_plan`."""
    config, settings = fleet_tables.config, fleet_tables.settings
    job = config.job
    federation = None
    if fleet_tables.data is not None:
        with name_source(("data",)):
            federation = fleet_tables.data.read(job.seed)
    if model is None:
        if config.model is None:
            raise ConfigError(("model", "path"), expected="an ONNX file", got="nothing")
        with name_source(("model", "path")):
            model = import_onnx(read_source(config.model, import_choices(config)), Path(config.model).stem)
    check_samples = partial(fit_data if federation is None else _check_dealt, model=model, recipe=job.recipe)
    devices = read_devices(
        fleet_tables.body.get("devices"),
        job.seed,
        path.parent,
        federation,
        fleet_tables.links,
        check=check_samples,
        form=form_of(model, job.recipe),
    )
    # After the fleet is read: rounds can't wait for more devices than there are.
    job_table = fleet_tables.body.get("job", {})
    job = replace(job, devices=_awaited_devices(job_table, job, len(devices)))
    reference_job = job_without_limits(fedavg_job(job), job_table) if reference else None
    if job.strategy not in LIMITED_STRATEGIES:
        job = job_without_limits(job, job_table)
    evaluation, calibration = None, None
    if config.evaluation is not None:
        with name_source(("evaluation", "data")):
            evaluation = load_evaluation(config.evaluation, model, job.recipe)
    elif federation is not None and (dealt := federation.evaluation()) is not None:
        evaluation = scale_arrays(dealt, job.recipe)
    if config.calibration is not None:
        with name_source(("calibration", "data")):
            calibration = load_calibration(config.calibration, model, job.recipe)
    elif federation is not None and (inputs := federation.calibration_inputs()) is not None:
        calibration = scale_arrays((inputs, inputs), job.recipe)[0]
    return FleetPlan(
        title=title or job.name,
        job=job,
        model=model,
        devices=devices,
        evaluation=evaluation,
        calibration=calibration,
        dropouts=fleet_tables.dropouts,
        weather=fleet_tables.weather,
        availability=fleet_tables.availability,
        measure=_model_measure(settings, evaluation, calibration, federation, job.recipe),
        checkpoints=settings.checkpoints,
        workers=settings.workers,
        cuda=settings.cuda,
        partition=_fleet_data(devices, federation, fleet_tables.data),
        reference=reference_job,
        track=track_targets(settings.track, ("simulation", "track")),
    )


def _model_measure(
    settings: SimulationSettings,
    evaluation: LabelledSamples | None,
    calibration: npt.NDArray[Any] | None,
    federation: Federation | None,
    recipe: Recipe,
) -> ModelMeasure | None:
    """The measurement of submodels that [simulation] asks for, on the server's samples and on the devices' tests."""
    if not settings.densities:
        return None
    if evaluation is None:
        raise ConfigError(("simulation", "densities"), expected="samples in [evaluation] to measure on")
    tests = None if federation is None else federation.pooled_tests()
    # [data] test may be 0
    sets = {} if tests is None or not len(tests[1]) else {"tests": scale_arrays(tests, recipe)}
    return ModelMeasure(
        *evaluation, densities=settings.densities, calibration=calibration, every=settings.every, sets=sets
    )


_COLOUR_SETTINGS = {1: "false", 3: "true"}


def _check_dealt(data: LocalData, model: Model, recipe: Recipe) -> LocalData:
    """Check samples of [data] as `fit_data`; an error about colours or sizes of images names the keys for them."""
    expected_shape, shape = model.architecture.input_shape, data.x_train.shape[1:]
    try:
        return fit_data(data, model, recipe)
    except DataError as error:
        if not (
            len(expected_shape) == len(shape) == 3
            and expected_shape != shape
            and {expected_shape[0], shape[0]} <= _COLOUR_SETTINGS.keys()
        ):
            raise
        keys = [f"colour = {_COLOUR_SETTINGS[expected_shape[0]]}"] * (expected_shape[0] != shape[0])
        keys += [f"size = {list(expected_shape[1:])}"] * (expected_shape[1:] != shape[1:])
        hint = f"{error.hint} For images in files or in a column, set {' and '.join(keys)} in [data]."
        raise DataError(error.what, expected=error.expected, got=error.got, hint=hint.strip()) from error


def _fleet_data(devices: Sequence[VirtualDevice], federation: Federation | None, plan: DataPlan | None) -> FleetData:
    """The fleet's data as reports show it."""
    if federation is None or plan is None:
        return FleetData.of_devices({d.name: d.data for d in devices if isinstance(d.data, LocalData)})
    dealt_data = FleetData.of_federation(federation, Path(plan.source).stem)
    counts = {d.name: row for d, row in zip(devices, dealt_data.counts.values(), strict=True)}
    return replace(dealt_data, counts=counts, settings=plan.settings())


def _awaited_devices(body: Mapping[str, object], job: Job, devices: int) -> int:
    """The number of devices that a round waits for: the configured one, at most the fleet's; by default all."""
    if "devices" not in body:
        return devices
    if job.devices > devices:
        note = f"note: [job] devices is {job.devices}, but there are {devices}: rounds start with {devices}."
        print(note, file=sys.stderr)
    return min(job.devices, devices)
