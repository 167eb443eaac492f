"""The tables of a `fleet.toml`, read and checked before any model, profile or data set is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.layers import SettingsLayer, errors_with_origin, file_layer, merge_tables
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.setting import check_settings, read_table, setting
from fedprune_server.config.tables import parse_config
from fedprune_server.config.track_targets import TRACK_TEXT, anchor_track_folders, track_targets
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.fleet.device_table import LinkSettings
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather, read_weather

_Tables = Mapping[str, Any] | None


@dataclass(frozen=True)
class SimulationSettings:
    """The table [simulation]."""

    workers: int = setting(1, "Number of processes.", within=(1, 10**6))
    cuda: bool = setting(False, "Whether devices train on an NVIDIA GPU, through onnxruntime.")
    checkpoints: int = setting(0, "Rounds between two saved global models; 0 for none.", within=(0, 10**6))
    densities: tuple[float, ...] = setting(
        (), "Densities of submodels that are measured on the server's samples.", within=(1e-6, 1)
    )
    every: int = setting(1, "Rounds between two measurements.", within=(1, 10**6))
    track: str = setting(OFF, TRACK_TEXT)

    def __post_init__(self) -> None:
        densities = validation.check_items(("simulation", "densities"), self.densities, 1000, "numbers")
        object.__setattr__(self, "densities", tuple(densities))
        check_settings(self, ("simulation",))
        track_targets(self.track, ("simulation", "track"))


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


def read_fleet_tables(path: Path, changes: _Tables = None, tables: _Tables = None, job: _Tables = None) -> FleetTables:
    """Read only a `fleet.toml`, and no model or data; its job has the keys of `job` that aren't None. Other arguments
    and errors as `read_fleet_plan`."""
    given_job = {key: value for key, value in (job or {}).items() if value is not None}
    given = {"job": given_job} if given_job else {}
    file = file_layer(path) if tables is None else SettingsLayer(str(path), dict(tables))
    layers = (file, SettingsLayer(str(path), dict(changes or {})), SettingsLayer("arguments", given))
    # Before anything is checked: the options are those of the strategy that runs.
    body = merge_tables(_merge_changes(file.tables, changes or {}), given)
    with errors_with_origin(layers):
        # One file may serve both commands: [server] is only for the daemon.
        config = parse_config({k: v for k, v in body.items() if k != "server"}, path.parent, simulated=True)
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
