"""A server's configuration as tables: what a `fleet.toml`, an earlier start and the command line say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, shown
from fedprune.jobs.job import Job
from fedprune.security.tls import SYSTEM
from fedprune.strategies import compose
from fedprune_server.config.alert_settings import PATHS as ALERT_PATHS
from fedprune_server.config.alert_settings import AlertSettings
from fedprune_server.config.layers import file_layer, located
from fedprune_server.config.server_config import ELSEWHERE, EMBEDDED, PATHS, SERVER, TEXTS, ServerConfig

TABLES = ("job", "model", "evaluation", "calibration", "server", "alerts")
"""Of a `fleet.toml`."""

_SIMULATED = ("devices", "data", "dropouts", "weather", "availability", "simulation")
"""Tables that only a simulation reads, so that one file serves both."""

_SAID = {
    "job: privacy": "job.privacy",
    "job: schedule": "job.schedule",
    "job": "job",
    "recipe": "job.recipe",
    "server": "server",
    "alerts": "alerts",
}
"""Tables by how errors of what they are made into name them."""


def read_config(path: Path) -> ServerConfig:
    """Read a `fleet.toml`. Paths in it count from its folder.

    Raises:
        ConfigError: It can't be read, is no TOML, or a key is unknown or has a wrong value; the message names file,
            line, column, table and key.
        MissingExtraError: Python 3.10 without the package tomli.
    """
    layer = file_layer(path)
    with located([layer], str(path)):
        return parse_config(layer.tables, str(path), path.parent)


def parse_config(body: Mapping[str, Any], where: str, folder: Path) -> ServerConfig:
    """Check the tables of a `fleet.toml`.

    Args:
        body: The tables.
        where: The file's name, for errors.
        folder: What relative paths count from.

    Raises:
        ConfigError: As `read_config`.
    """
    validation.only((*TABLES, *_SIMULATED), body, where, "table")
    for table in body.keys() - set(_SIMULATED):
        if not isinstance(body[table], Mapping):
            raise ConfigError(f"{where}: {table}", expected=f"a table [{table}]", got=repr(body[table]))
    values: dict[str, Any] = {}
    model, server = (body.get(t, {}) for t in ("model", "server"))
    validation.only(("path", "input_shape"), model, f"{where}: [model]")
    validation.only(SERVER, server, f"{where}: [server]")
    if "path" in model:
        values["model"] = _source(_text(model["path"], f"{where}: [model] path"), folder)
    if "input_shape" in model:
        values["input_shape"] = _shape(model["input_shape"], f"{where}: [model] input_shape")
    for table in ("evaluation", "calibration"):
        data = body.get(table, {})
        validation.only(("data",), data, f"{where}: [{table}]")
        if "data" in data:
            values[table] = _source(_text(data["data"], f"{where}: [{table}] data"), folder)
    for key in TEXTS:
        if key in server:
            values[key] = _text(server[key], f"{where}: [server] {key}")
    for key in ("state", *PATHS):
        if key in values:
            values[key] = SYSTEM if (key, values[key]) == ("ca", str(SYSTEM)) else folder / values[key]
    alerts = anchored({"alerts": body.get("alerts", {})}, folder)["alerts"]
    values.update({key: value for key, value in server.items() if key not in TEXTS})
    return _located(
        lambda: ServerConfig(
            job=Job.from_dict(body.get("job", {})), alerts=AlertSettings.from_dict(alerts, "[alerts]"), **values
        ),
        where,
    )


def anchored(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tables of a `fleet.toml` whose relative paths have been counted from a folder."""
    found = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tables.items()}
    for table, key in (("model", "path"), ("evaluation", "data"), ("calibration", "data")):
        if isinstance(text := found.get(table, {}).get(key), str) and text.strip():
            found[table][key] = _source(text, folder)
    files = [("server", key) for key in ("state", *PATHS)] + [("alerts", key) for key in ALERT_PATHS]
    for table, key in files:
        text = found.get(table, {}).get(key)
        if isinstance(text, str) and text.strip() and (key, text) != ("ca", str(SYSTEM)):
            found[table][key] = str(folder / text)
    return found


def as_tables(config: ServerConfig) -> dict[str, Any]:
    """The tables of a `fleet.toml` that says the same as a configuration; paths count from the current folder."""
    server = {k: str(v) if isinstance(v, Path) else v for k in SERVER if (v := getattr(config, k)) is not None}
    alerts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config.alerts).items() if v is not None}
    tables: dict[str, Any] = {"job": config.job.to_dict(), "server": server, "model": {}, "alerts": alerts}
    if config.model is not None:
        tables["model"]["path"] = config.model
    if config.input_shape is not None:
        tables["model"]["input_shape"] = list(config.input_shape)
    for table in ("evaluation", "calibration"):
        if (data := getattr(config, table)) is not None:
            tables[table] = {"data": data}
    return tables


def overridden(
    config: ServerConfig, job: Mapping[str, Any], server: Mapping[str, Any], alerts: Mapping[str, Any] | None = None
) -> ServerConfig:
    """The configuration with what the command line says instead; None means that it says nothing.

    Raises:
        ConfigError: A value is wrong.
    """
    chosen = {k: v for k, v in job.items() if v is not None}
    if chosen.get("schedule", {}).get("kind") == config.job.schedule.get("kind"):
        chosen.pop("schedule", None)  # with the other keys of the same kind
    values = {k: v for k, v in server.items() if v is not None}

    def build() -> ServerConfig:
        alert_values = {k: v for k, v in (alerts or {}).items() if v is not None}
        return replace(
            config, job=replace(config.job, **chosen), alerts=replace(config.alerts, **alert_values), **values
        )

    return _located(build, "command line")


def with_stored(config: ServerConfig, stored: Mapping[str, Any], chosen: Mapping[str, Any]) -> ServerConfig:
    """The configuration with the server's settings of an earlier start.

    Args:
        config: The configuration.
        stored: What `server_settings` gave then.
        chosen: What the command line says; None means that it says nothing. What it says is left to `overridden`, so
            that it also replaces a setting that has become wrong.

    Raises:
        ConfigError: A setting no longer makes sense.
    """
    values = {k: v for k, v in stored.items() if k in SERVER and k not in ELSEWHERE and chosen.get(k) is None}
    broker = str(chosen.get("broker") or values.get("broker", EMBEDDED))
    for key in PATHS:
        if values.get(key) is not None:
            values[key] = Path(values[key])
    if not broker.startswith("mqtts://") or chosen.get("broker") is not None:
        values.pop("ca", None)  # the authority of another broker than the one to use
    return _located(lambda: replace(config, **values), "settings of the last start")


def _located(build: Callable[[], ServerConfig], where: str) -> ServerConfig:
    config = ServerConfig()
    try:
        config = build()
        compose(config.job)  # a wrong option is better known now than when the first device is there
        return config
    except ConfigError as error:
        what = error.what
        kind, _, option = what.partition(": ")
        if kind == "allocator" and option in config.job.options:
            what = f"[job] option {option} of {config.job.strategy}"
        for table, name in _SAID.items():
            if what.startswith(f"{table}: "):
                what = f"[{name}] {what.removeprefix(f'{table}: ')}"
        raise ConfigError(f"{where}: {what}", expected=error.expected, got=error.got, hint=error.hint) from error


def _source(text: str, folder: Path) -> str:
    """A file counted from `folder`; the name of a function stays as it is."""
    module, colon, name = text.rpartition(":")
    function = bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))
    return text if function else str(folder / text)


def _shape(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(n) is not int or n < 1 for n in value):
        raise ConfigError(where, expected="a list of sizes of 1 or more, such as [3, 32, 32]", got=shown(value))
    return tuple(value)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(where, expected="a text", got=repr(value))
    return value
