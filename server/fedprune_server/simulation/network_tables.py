"""The tables [dropouts], [weather], [availability] and [simulation] of a `fleet.toml`, which only simulations read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, FedpruneError
from fedprune_server.simulation.fleet.fleet_devices import MEGABYTE, Link
from fedprune_server.simulation.network_model import PR_FL, PR_FL_LINKS, Availability, DropOuts, Weather

_LIKE: dict[str, tuple[Weather, tuple[Link, ...]]] = {
    "pr-fl": (
        PR_FL,
        tuple({"down_mb_s": down, "up_mb_s": up, "latency_s": 0.0} for down, up in PR_FL_LINKS),
    ),
}
"""Environments of published simulations."""


@dataclass(frozen=True)
class Settings:
    """The table [simulation].

    Attributes:
        workers: Number of processes.
        cuda: Whether devices train on an NVIDIA GPU, through onnxruntime.
        checkpoints: Rounds between two saved global models; 0 for none.
        densities: Densities of submodels that are measured on the server's samples.
        every: Rounds between two measurements.
    """

    workers: int = 1
    cuda: bool = False
    checkpoints: int = 0
    densities: tuple[float, ...] = ()
    every: int = 1


def read_weather(body: Mapping[str, object], path: Path) -> tuple[Weather, tuple[Link, ...]]:
    """The table [weather], and links for devices that have none of their own.

    Raises:
        ConfigError: A key is unknown or a value wrong; the message names it.
    """
    where = f"{path}: [weather]"
    table = dict(_table(body, "weather", path))
    like = table.pop("like", None)
    if like is not None:
        validation.word(f"{where} like", like, tuple(_LIKE))
    weather, links = _LIKE[like] if isinstance(like, str) else (Weather(), ())
    names = {f.name.replace("_bytes_s", "_mb_s"): f.name for f in fields(Weather)}
    validation.only(("like", *names), table, where)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "draws":
            values[key] = validation.whole(f"{where} draws", value, 1, 10_000)
        else:
            scale, high = (MEGABYTE, 1e6) if key.endswith("_mb_s") else (1.0, 3.0)
            values[names[key]] = scale * validation.number(f"{where} {key}", value, 0, high)
    return replace(weather, **values), links


def read_availability(body: Mapping[str, object], path: Path) -> Availability:
    """The table [availability]; raises as `read_weather`."""
    table = _table(body, "availability", path)
    where = f"{path}: [availability]"
    validation.only([f.name for f in fields(Availability)], table, where)
    limits = {"period_s": (0.0, 1e9)}
    values = {k: validation.number(f"{where} {k}", v, *limits.get(k, (1e-6, 1.0))) for k, v in table.items()}
    try:
        return Availability(**values)
    except FedpruneError as error:
        raise ConfigError(where, expected=error.expected, got=error.got) from error


def read_dropouts(body: Mapping[str, object], path: Path) -> DropOuts:
    """The table [dropouts]; raises as `read_weather`."""
    table = _table(body, "dropouts", path)
    where = f"{path}: [dropouts]"
    validation.only([f.name for f in fields(DropOuts)], table, where)
    limits = {"probability": 1.0, "away_s": 1e12}
    values = {
        k: validation.number(f"{where} {k}", v, 0, limits[k], above=k == "away_s", below=True) for k, v in table.items()
    }
    return DropOuts(**values)


def read_settings(body: Mapping[str, object], path: Path) -> Settings:
    """The table [simulation]; raises as `read_weather`."""
    table = _table(body, "simulation", path)
    where = f"{path}: [simulation]"
    validation.only([f.name for f in fields(Settings)], table, where)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "cuda":
            validation.truth(f"{where} cuda", value)
            values[key] = value
        elif key == "densities":
            if not isinstance(value, list):
                raise ConfigError(f"{where} densities", expected="a list of numbers", got=repr(value))
            values[key] = tuple(validation.number(f"{where} densities", v, 1e-6, 1) for v in value)
        else:
            values[key] = validation.whole(f"{where} {key}", value, 0 if key == "checkpoints" else 1, 10**6)
    return Settings(**values)


def _table(body: Mapping[str, object], name: str, path: Path) -> Mapping[str, object]:
    table = body.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: [{name}]", expected=f"a table [{name}]", got=repr(table))
    return table
