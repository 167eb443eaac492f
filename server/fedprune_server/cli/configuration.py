"""What `fedprune-server run` is to use: command line over environment over file, or over what its last start used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune_server.config.environment import CONFIG, environment_layer
from fedprune_server.config.layers import Layer, file_layer, located, merged
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.config.tables import as_tables, overridden, parse_config
from fedprune_server.engine.state_directory import stored_config
from fedprune_server.storage.database import check_url

_JOB = (
    "name", "seed", "rounds", "devices", "participation", "strategy", "density",
    "over_selection", "fairness", "in_flight", "pace",
)  # fmt: skip
_COMMAND_LINE, _LAST_START, _DEFAULTS = "command line", "the last start", "the defaults"


@dataclass(frozen=True)
class Configured:
    """A configuration, and what it is made of.

    Attributes:
        config: The configuration.
        layers: Its layers, from the lowest to the highest.
    """

    config: ServerConfig
    layers: tuple[Layer, ...]


def configured(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Configured:
    """The configuration of `run` with these options.

    Without a file, of the command line or the environment, the settings of the state folder's last start count instead.

    Args:
        arguments: The options of `run`.
        environment: Environment variables.

    Raises:
        ConfigError: A setting is unknown or has a wrong value; the message says where it stands.
        StorageError: The state folder is damaged.
    """
    job, server, alerts, command = _chosen(arguments)
    above = environment_layer(environment)
    path = arguments.config
    if path is None and environment.get(CONFIG):
        path = Path(environment[CONFIG])
    if path is not None:
        below, where, folder = file_layer(path), str(path), path.parent
    else:
        below, where, folder = _last_start(above, server), _LAST_START, Path()
    layers = (below, above, command)
    with located(layers, where):
        config = parse_config(merged(below.tables, above.tables), where, folder)
    with located(layers, _COMMAND_LINE):
        config = overridden(config, job, server, alerts)
        _check_database(config.database)
    return Configured(config, layers)


def _check_database(url: str | None) -> None:
    """Refuse an address now that can't be used, while it is known where it stands."""
    if url is None:
        return
    try:
        check_url(url)
    except ConfigError as error:
        what = f"{_COMMAND_LINE}: [server] {error.what.removeprefix('server: ')}"
        raise ConfigError(what, expected=error.expected, got=error.got, hint=error.hint) from error


def _last_start(above: Layer, server: Mapping[str, Any]) -> Layer:
    """The settings with which the state folder's last start ran, if there was one."""
    said = {**above.tables.get("server", {}), **{k: v for k, v in server.items() if v is not None}}
    fresh = ServerConfig()
    stored = stored_config(Path(said.get("state", fresh.state)), fresh, said)
    return Layer(_DEFAULTS) if stored == fresh else Layer(_LAST_START, as_tables(stored))


def _chosen(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Layer]:
    """The command line's settings of the job, the server and alerts; None for those that it leaves out."""
    job = {k: getattr(arguments, k) for k in _JOB} | {"deadline_s": arguments.deadline}
    job["schedule"] = None if arguments.schedule is None else {"kind": arguments.schedule}
    names = [f.name for f in fields(ServerConfig) if f.name not in ("job", "input_shape", "alerts")]
    server = {k: v for k in names if (v := getattr(arguments, k, None)) is not None}
    alerts = {"webhook": arguments.alert_webhook}
    keys = {("job", k): v for k, v in job.items()} | {("alerts", k): v for k, v in alerts.items()}
    for name, value in server.items():
        key = {"model": ("model", "path"), "evaluation": ("evaluation", "data"), "calibration": ("calibration", "data")}
        keys[key.get(name, ("server", name))] = value
    options = {"deadline_s": "deadline", "path": "model", "data": "", "webhook": "alert-webhook"}
    tables: dict[str, Any] = {}
    places: dict[tuple[str | int, ...], str] = {}
    for (table, key_), value in keys.items():
        if value is not None:
            tables.setdefault(table, {})[key_] = value
            option = (options.get(key_, key_) or table).replace("_", "-")
            places[(table, key_)] = f"{_COMMAND_LINE}, --{option}"
    return job, server, alerts, Layer(_COMMAND_LINE, tables, places)
