"""A server's configuration as tables: what a `fleet.toml`, an earlier start and the command line say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, KeyPath, value_text
from fedprune.core.settings import check_fields
from fedprune.jobs.job import Job
from fedprune.model.lengths import Lengths
from fedprune.wire.urls import SYSTEM_AUTHORITIES
from fedprune_export.model_options import ImportChoices
from fedprune_server.config.alert_settings import PATH_KEYS as ALERT_PATHS
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.server_config import PATH_SETTINGS, SERVER_KEYS, TABLE_KEYS, ServerConfig
from fedprune_server.config.setting import check_setting_text, read_table
from fedprune_server.config.track_targets import anchor_track_folders

# The tables of a `fleet.toml`. A misspelt one is refused: its settings would silently be the defaults.
TABLES = ("job", "model", "evaluation", "calibration", "server", "alerts")

# Tables that only a simulation reads, so that one file serves both.
_SIMULATION_TABLES = ("devices", "data", "dropouts", "weather", "availability", "simulation")


def parse_config(body: Mapping[str, Any], folder: Path, *, simulated: bool = False) -> ServerConfig:
    """Check the tables of a `fleet.toml`, whose relative paths count from `folder`. If the job is `simulated`, it may
    limit what a server doesn't count. Raises `ConfigError` if a key is unknown or has a wrong value; its path is that
    in the tables."""
    validation.check_keys((*TABLES, *_SIMULATION_TABLES), body, ())
    for table in body.keys() - set(_SIMULATION_TABLES):
        validation.check_mapping((table,), body[table])
    tables = {table: {} for table in TABLES} | anchor_paths(body, folder)
    for table in ("model", "evaluation", "calibration"):
        validation.check_keys([key for name, key in TABLE_KEYS.values() if name == table], tables[table], (table,))
    validation.check_keys(SERVER_KEYS, tables["server"], ("server",))
    values = dict(tables["server"])
    for name, (table, key) in TABLE_KEYS.items():
        if key in tables[table]:
            check = _CHOICE_CHECKS.get(name, check_setting_text)
            values[name] = check(tables[table][key], (table, key))
    choices = {choice.name: values[choice.name] for choice in fields(ImportChoices) if choice.name in values}
    check_fields(ImportChoices(**choices), ("model",))

    # A function, because `_build_config` also translates the paths of errors that are raised here.
    def build() -> ServerConfig:
        job = Job.from_dict(tables["job"])
        if job.total_macs and not simulated:
            raise ConfigError(
                ("job", "total_macs"),
                expected="0, since a server doesn't count its boards' MACs",
                got=job.total_macs,
                hint="total_bytes and total_hours limit what a server's job spends.",
            )
        config = ServerConfig(job=job, alerts=read_table(AlertSettings, tables["alerts"], ("alerts",)), **values)
        if config.database is not None:
            from fedprune_server.storage.database import parse_database_url  # SQLAlchemy takes a while to import

            parse_database_url(config.database)
        return config

    return _build_config(build)


def anchor_paths(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tables of a `fleet.toml` with relative paths counted from a folder."""
    anchored_tables = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tables.items()}
    # Models, samples, losses and metrics may be functions; files of the server may not.
    source_keys = [TABLE_KEYS[name] for name in ("model", "loss", "metric", "evaluation", "calibration")]
    file_keys = [("server", key) for key in ("state", *PATH_SETTINGS)] + [("alerts", key) for key in ALERT_PATHS]
    for table, key in (*source_keys, *file_keys):
        values = anchored_tables.get(table)
        text = values.get(key) if isinstance(values, dict) else None
        if isinstance(text, str) and text.strip() and (key, text) != ("ca", str(SYSTEM_AUTHORITIES)):
            is_source = (table, key) in source_keys
            anchored_tables[table][key] = _anchor_source(text, folder) if is_source else str(folder / text)
    server = anchored_tables.get("server")
    if isinstance(server, dict) and isinstance(server.get("track"), str):
        server["track"] = anchor_track_folders(server["track"], folder, ("server", "track"))
    return anchored_tables


def config_tables(config: ServerConfig) -> dict[str, Any]:
    """A configuration as the tables of a `fleet.toml`, with paths from the current folder."""
    tables: dict[str, Any] = {
        "job": config.job.to_dict(),
        "model": {},
        "server": {key: getattr(config, key) for key in SERVER_KEYS},
        "alerts": dict(vars(config.alerts)),
    }
    for name, (table, key) in TABLE_KEYS.items():
        if (value := getattr(config, name)) is not None:
            tables.setdefault(table, {})[key] = list(value) if isinstance(value, tuple) else value
    for table in ("server", "alerts"):
        tables[table] = {k: str(v) if isinstance(v, Path) else v for k, v in tables[table].items() if v is not None}
    return tables


def _build_config(build: Callable[[], ServerConfig]) -> ServerConfig:
    """A configuration whose job has a strategy. Raises `ConfigError`; its path begins at the tables."""
    from fedprune.strategies import compose  # `run --help` needs none of them, and they take a while to import

    options: Mapping[str, Any] = {}
    try:
        config = build()
        options = config.job.options
        compose(config.job)  # a wrong option is reported now, not when the first device connects
        return config
    except ConfigError as error:
        # Jobs and strategies don't know where in a fleet.toml their settings stand: complete the path.
        path = error.path
        if path[:1] == ("recipe",):
            path = ("job", *path)
        elif len(path) == 2 and path[0] not in TABLES and path[1] in options:  # a part of the strategy refuses it
            path = ("job", "options", path[1])
        raise error.with_subject(error.description, path) from error


def _anchor_source(text: str, folder: Path) -> str:
    """A file counted from `folder`; the name of a function stays as it is."""
    module, colon, name = text.rpartition(":")
    is_function_name = bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))
    return text if is_function_name else str(folder / text)


def _read_shape(value: object, path: KeyPath) -> tuple[int | str, ...]:
    sizes = value if isinstance(value, (list, tuple)) else []
    if not sizes or not all(isinstance(n, str) or validation.is_whole(n, 1) for n in sizes):
        raise ConfigError(path, expected="a list of sizes of 1 or more, such as [3, 32, 32]", got=value_text(value))
    for size in sizes:
        if isinstance(size, str):
            Lengths.parse(size, ConfigError, path)
    return tuple(sizes)


def _read_fixed_inputs(value: object, path: KeyPath) -> dict[str, float]:
    numbers = validation.check_mapping(path, value)
    for name, number in numbers.items():
        if not isinstance(number, bool):
            validation.check_number((*path, name), number)
    return dict(numbers)


# The checks of choices that are no texts; `check_fields` has those of switches, numbers and words.
_CHOICE_CHECKS: Mapping[str, Callable[[Any, KeyPath], Any]] = {
    "input_shape": _read_shape,
    "fix": _read_fixed_inputs,
    "parameters": lambda names, path: validation.check_texts(path, names),
    **dict.fromkeys(("token_ids", "class_axis", "prefer", "base"), lambda value, _: value),
}
