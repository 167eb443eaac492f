"""Input of `fedprune-simulate`: a `fleet.toml` with its [[devices]], or the demo's fleet.

The demo sets no widths: its boards are shipped hardware profiles with different links (a modem with a data plan, a
shared uplink, a cable), from which the planner derives them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, DataError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import find_profile
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import ImportChoices, import_onnx, read_source
from fedprune_export.pruning.model import Model
from fedprune_server.config.layers import SettingsLayer, errors_with_origin, file_layer, merge_tables
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.setting import read_table
from fedprune_server.config.tables import job_with_changes, parse_config
from fedprune_server.config.track_targets import TrackTarget, anchor_track_folders, track_targets
from fedprune_server.executor.server_samples import fit_data, load_calibration, load_evaluation
from fedprune_server.simulation.datasets.federation import DataPlan, Federation, FleetData
from fedprune_server.simulation.digits import DIGITS_TITLE, deal_digits, digits_model
from fedprune_server.simulation.experiment import REFERENCE, Experiment, fedavg_job
from fedprune_server.simulation.fleet.virtual_device import LinkSettings, VirtualDevice, name_source, read_devices
from fedprune_server.simulation.measure import ModelMeasure
from fedprune_server.simulation.network_model import (
    Availability,
    DropOuts,
    SimulationSettings,
    Weather,
    read_weather,
)

DEMO_ROUNDS = 24
DEMO_QUICK_ROUNDS = 2
DEMO_BYTE_BUDGET = 195_000  # bytes per device and round, both ways, that the fleet's job allows

_DEADLINE_S = 60.0


@dataclass(frozen=True)
class DemoBoard:
    """One board of the demo.

    Attributes:
        kind: Name of a shipped profile.
        bytes_per_round: Bytes per round, both ways, that the link may carry; None for the profile's figure.
    """

    name: str
    kind: str
    link: str = ""
    bytes_per_round: int | None = None

    def profile(self) -> HardwareProfile:
        """The shipped profile with this board's link. Raises `ProfileError` if the shipped profile is missing or
        damaged."""
        shipped = find_profile(self.kind)
        if self.bytes_per_round is None:
            return shipped
        return replace(
            shipped,
            name=f"{shipped.name}-{self.link}",
            link=replace(shipped.link, bytes_per_round=self.bytes_per_round),
            sources={**shipped.sources, "link.bytes_per_round": f"estimate: demo, a board that hangs on a {self.link}"},
        )


DEMO_BOARDS = (
    DemoBoard("attic-zero", "raspberry-pi-zero-2w", "metered-modem", 120_000),
    DemoBoard("barn-zero", "raspberry-pi-zero-2w", "metered-modem", 120_000),
    DemoBoard("yard-pi4", "raspberry-pi-4b", "shared-uplink", 142_000),
    DemoBoard("hall-pi5", "raspberry-pi-5"),
    DemoBoard("dock-orin", "jetson-orin-nano"),
    DemoBoard("desk-x86", "generic-x86-64"),
)


def demo_job(seed: int = 0, rounds: int = DEMO_ROUNDS) -> Job:
    """The fleet's job: planned widths and the recommended strategy."""
    return Job(
        name="fleet",
        seed=seed,
        rounds=rounds,
        devices=len(DEMO_BOARDS),
        deadline_s=_DEADLINE_S,
        byte_budget=DEMO_BYTE_BUDGET,
        strategy="fedprune",
        recipe=Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9),
    )


def too_few_rounds(rounds: int) -> str:
    """Reason not to judge a demo of so few rounds; empty if it is judged."""
    if rounds >= DEMO_ROUNDS:
        return ""
    return f"Too few rounds to judge accuracies and bytes by: {rounds}; the demo takes {DEMO_ROUNDS}."


def demo_reference_job(seed: int = 0, rounds: int = DEMO_ROUNDS) -> Job:
    """FedAvg on the same boards, with the same rounds and steps."""
    return fedavg_job(demo_job(seed, rounds))


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
        tables: The tables, if they don't come from a file; `path` then appears in errors alone.
        model: Replaces that of [model].

    Raises:
        ConfigError: It can't be read, or a key is missing, unknown or wrong; the message names it.
        FedpruneError: Model, data or a profile can't be read; the message names table and key.
    """
    fleet_tables = read_fleet_tables(path, changes, tables)
    with errors_with_origin(fleet_tables.layers):
        job = _override_job(fleet_tables.config.job, strategy, seed, rounds)
        return _build_plan(fleet_tables, path, job, title, reference=reference, model=model)


def _build_plan(
    fleet_tables: FleetTables, path: Path, job: Job, title: str, *, reference: bool, model: Model | None
) -> FleetPlan:
    """The plan of a file's tables; arguments and errors as `read_fleet_plan`."""
    config, settings = fleet_tables.config, fleet_tables.settings
    federation = None
    if fleet_tables.data is not None:
        with name_source(("data",)):
            federation = fleet_tables.data.read(job.seed)
    if model is None:
        if config.model is None:
            raise ConfigError(("model", "path"), expected="an ONNX file", got="nothing")
        with name_source(("model", "path")):
            choices = ImportChoices(
                input_shape=config.input_shape, loss=config.loss, metric=config.metric, lora=config.lora,
                base=config.base,
            )  # fmt: skip
            source_model = read_source(config.model, choices)
            model = import_onnx(source_model, Path(config.model).stem)
    check_samples = partial(fit_data if federation is None else _check_dealt, model=model, recipe=job.recipe)
    devices = read_devices(
        fleet_tables.body.get("devices"), job.seed, path.parent, federation, fleet_tables.links, check=check_samples
    )
    # After the fleet is read: rounds can't wait for more devices than there are.
    job = replace(job, devices=_awaited_devices(fleet_tables.body.get("job", {}), job, len(devices)))
    evaluation, calibration = None, None
    if config.evaluation is not None:
        with name_source(("evaluation", "data")):
            evaluation = load_evaluation(config.evaluation, model, job.recipe)
    elif federation is not None:
        evaluation = federation.evaluation()
    if config.calibration is not None:
        with name_source(("calibration", "data")):
            calibration = load_calibration(config.calibration, model)
    elif federation is not None:
        calibration = federation.calibration_inputs()
    measure = None
    if settings.densities:
        if evaluation is None:
            raise ConfigError(("simulation", "densities"), expected="samples in [evaluation] to measure on")
        tests = None if federation is None else federation.pooled_tests()
        sets = {} if tests is None or not len(tests[1]) else {"tests": tests}  # [data] test may be 0
        measure = ModelMeasure(
            *evaluation, densities=settings.densities, calibration=calibration, every=settings.every, sets=sets
        )
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
        measure=measure,
        checkpoints=settings.checkpoints,
        workers=settings.workers,
        cuda=settings.cuda,
        partition=_fleet_data(devices, federation, fleet_tables.data),
        reference=fedavg_job(job) if reference else None,
        track=track_targets(settings.track, ("simulation", "track")),
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


@dataclass(frozen=True)
class FleetTables:
    """A `fleet.toml` before models, profiles or data are read.

    Attributes:
        body: Its tables, with the changes.
        layers: The file, and the changes.
        dropouts: Devices that disconnect.
        links: Links for devices that have none.
    """

    body: Mapping[str, Any]
    layers: tuple[SettingsLayer, ...]
    config: ServerConfig
    data: DataPlan | None
    dropouts: DropOuts
    availability: Availability
    weather: Weather
    links: tuple[LinkSettings, ...]
    settings: SimulationSettings


def read_fleet_tables(
    path: Path, changes: Mapping[str, Any] | None = None, tables: Mapping[str, Any] | None = None
) -> FleetTables:
    """Read a `fleet.toml` alone; arguments and errors as `read_fleet_plan`."""
    file = file_layer(path) if tables is None else SettingsLayer(str(path), dict(tables))
    layers = (file, SettingsLayer(str(path), dict(changes or {})))
    body = _merge_changes(file.tables, changes or {})
    with errors_with_origin(layers):
        # One file may serve both commands: [server] is the daemon's alone.
        shared = {k: v for k, v in body.items() if k != "server"}
        config = parse_config(shared, path.parent, simulated=True)
        data = _data_plan(body["data"], body.get("devices"), path.parent) if "data" in body else None
        dropouts = read_table(DropOuts, body.get("dropouts", {}), ("dropouts",))
        availability = read_table(Availability, body.get("availability", {}), ("availability",))
        settings = read_table(SimulationSettings, body.get("simulation", {}), ("simulation",))
        track = anchor_track_folders(settings.track, path.parent, ("simulation", "track"))
        settings = replace(settings, track=track)
        return FleetTables(body, layers, config, data, dropouts, availability, *read_weather(body), settings)


def _merge_changes(body: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge changes into a file's tables. If the changes name a strategy, even the same one, the file's options are
    dropped."""
    job, job_changes = body.get("job"), changes.get("job")
    if isinstance(job, Mapping) and isinstance(job_changes, Mapping) and "strategy" in job_changes:
        body = {**body, "job": {k: v for k, v in job.items() if k != "options"}}
    return merge_tables(body, changes)


def _data_plan(body: object, devices: object, folder: Path) -> DataPlan:
    """The table [data], with the number of devices that [[devices]] may set instead."""
    if isinstance(body, Mapping) and "devices" not in body and isinstance(devices, list):
        counts = [r.get("count", 1) for r in devices if isinstance(r, Mapping) and {"name", "count"} & set(r)]
        if len(counts) == len(devices) and all(isinstance(c, int) for c in counts):
            body = {**body, "devices": sum(counts)}
    return DataPlan.from_dict(body, folder)


def demo_plan(*, strategy: str | None = None, seed: int | None = None, rounds: int | None = None) -> FleetPlan:
    """The fleet of `fedprune-server demo`, and FedAvg on the same devices.

    `strategy` replaces the demo's; the reference stays FedAvg. Raises `ConfigError` if one of them is wrong.
    """
    data = deal_digits([b.name for b in DEMO_BOARDS], seed=seed or 0)
    job = _override_job(demo_job(seed or 0), strategy, seed, rounds)
    return FleetPlan(
        job.strategy,
        job,
        import_onnx(digits_model(), "digits-net"),
        tuple(VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in DEMO_BOARDS),
        (data.x, data.y),
        data.calibration,
        partition=FleetData.of_devices(data.devices, DIGITS_TITLE),
        reference=_override_job(demo_reference_job(seed or 0), None, seed, rounds),
    )


def _override_job(job: Job, strategy: str | None, seed: int | None, rounds: int | None) -> Job:
    return job_with_changes(job, {"strategy": strategy, "seed": seed, "rounds": rounds})


def _awaited_devices(body: Mapping[str, object], job: Job, devices: int) -> int:
    """The number of devices that a round waits for: the configured one, at most the fleet's; by default all."""
    if "devices" not in body:
        return devices
    if job.devices > devices:
        note = f"note: [job] devices is {job.devices}, but there are {devices}: rounds start with {devices}."
        print(note, file=sys.stderr)
    return min(job.devices, devices)
