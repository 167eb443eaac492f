"""The simulated environment: varying links and boards, the server's own link, devices that disconnect.

Random numbers are keyed by the job's seed and their purpose, so a run doesn't depend on the order of events. Speeds
vary by the mean of log-normal draws (PR-FL's simulation: 20 draws, σ = 0.3 for devices and 0.1 for the server).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ConfigError, FedpruneError, shown
from fedprune.core.rng import keyed
from fedprune.planning.profile import Link
from fedprune_server.simulation.fleet.virtual_device import MEGABYTE, LinkSettings

ALWAYS = math.inf
"""End of a window that never closes."""


@dataclass(frozen=True)
class DropOuts:
    """Devices that disconnect during a round.

    Attributes:
        probability: Probability that a device disconnects while it works on an offer.
        away_s: Mean virtual seconds until it reconnects.
    """

    probability: float = 0.0
    away_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1 or not self.away_s > 0:
            raise ConfigError(
                "drop-outs",
                expected="a probability from 0 to below 1 and away_s above 0",
                got=(self.probability, self.away_s),
            )


@dataclass(frozen=True)
class Availability:
    """Periodic windows in which devices are connected, such as the hours in which they are plugged in.

    Each device has its own phase, and its own share of the period between `least` and `most`.

    Attributes:
        period_s: Period in seconds; 0 for devices that are always connected.
        least: Smallest share of the period, above 0.
        most: Largest share.
    """

    period_s: float = 0.0
    least: float = 1.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.period_s < math.inf or not 0 < self.least <= self.most <= 1:
            raise ConfigError(
                "availability",
                expected="period_s of 0 or more, and shares 0 < least <= most <= 1",
                got=(self.period_s, self.least, self.most),
            )

    def window(self, seed: int, device: str, at: float) -> tuple[float, float]:
        """Begin and end of the window that is open at `at` seconds, else of the next one.

        The window of a device that is always connected begins now and never ends.
        """
        period = self.period_s
        chance = keyed(seed, device, "availability")
        phase, share = chance.random() * period, self.least + (self.most - self.least) * chance.random()
        if not period or share >= 1:
            return at, ALWAYS
        count = math.floor((at - phase) / period)
        while at >= phase + count * period + share * period:
            count += 1
        begin = phase + count * period
        return begin, begin + share * period


@dataclass(frozen=True)
class Weather:
    """Variation of devices and links, and the capacity of the server's link.

    Attributes:
        links_sigma: σ of the log-normal factor on a device's link speed, drawn for every round and direction.
        compute_sigma: σ of the factor on its training speed, drawn for every round.
        links_spread: σ of a factor on both link speeds of a device, constant over the run.
        compute_spread: σ of a factor on its training speed, constant over the run.
        draws: Number of draws whose mean is a round's factor.
        server_up_bytes_s: Bytes/s that the server can send to all devices together; 0 for no limit.
        server_down_bytes_s: Bytes/s that it can receive; 0 for no limit.
        server_sigma: σ of the factor on both in a round.
    """

    links_sigma: float = 0.0
    compute_sigma: float = 0.0
    links_spread: float = 0.0
    compute_spread: float = 0.0
    draws: int = 1
    server_up_bytes_s: float = 0.0
    server_down_bytes_s: float = 0.0
    server_sigma: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = (1, 10_000) if field.name == "draws" else (0, 10**12 if field.name.endswith("_s") else 3)
            if not low <= value <= high:
                raise ConfigError(f"weather: {field.name}", expected=f"a number from {low} to {high}", got=shown(value))

    def link(self, seed: int, number: int, device: str, way: str) -> float:
        """Factor on a device's link speed in a round; `way` is `down` or `up`."""
        own = self._spread(seed, device, "links", self.links_spread)
        return own * self._drawn(self.links_sigma, seed, number, device, way)

    def compute(self, seed: int, number: int, device: str) -> float:
        """Factor on a device's training speed in a round."""
        own = self._spread(seed, device, "compute", self.compute_spread)
        return own * self._drawn(self.compute_sigma, seed, number, device, "compute")

    def server(self, seed: int, number: int, way: str) -> float:
        """Bytes/s that the server's link carries in a round; `way` is seen from the devices, so `down` is what it
        sends.
        """
        rate = self.server_up_bytes_s if way == "down" else self.server_down_bytes_s
        return rate * self._drawn(self.server_sigma, seed, number, "server", way) if rate else math.inf

    def arrives(
        self, seed: int, number: int, device: str, link: Link, way: str, size: int, now: float, free: float
    ) -> tuple[float, float]:
        """Transfer bytes between the server and a device in a round; arguments and results as `transfer`."""
        rate = (link.down_bytes_s if way == "down" else link.up_bytes_s) * self.link(seed, number, device, way)
        arrived, free = transfer(now, free, size, rate, self.server(seed, number, way))
        return arrived + link.latency_s, free

    def _drawn(self, sigma: float, seed: int, number: int, who: str, what: str) -> float:
        if not sigma:
            return 1.0
        return float(keyed(seed, number, who, what, "weather").lognormal(0.0, sigma, self.draws).mean())

    @staticmethod
    def _spread(seed: int, device: str, what: str, sigma: float) -> float:
        return float(keyed(seed, device, what, "spread").lognormal(0.0, sigma)) if sigma else 1.0


def transfer(now: float, free: float, size: int, rate: float, limit: float) -> tuple[float, float]:
    """Transfer bytes over the server's link, first come first served, and over a device's link (PR-FL's simulation).

    While a slow device still receives the end of one transfer, the server's link already serves the next.

    Args:
        now: Time at which the bytes are ready, in seconds.
        free: Time at which the server's link is free.
        size: Bytes.
        rate: Capacity of the device's link, in bytes/s.
        limit: Capacity of the server's link, in bytes/s.

    Returns:
        Time of arrival of the last byte, and the new time at which the server's link is free.
    """
    begin = max(now, free)
    return begin + size / min(rate, limit), begin + size / limit


PR_FL_LINKS = (
    (20.0, 5.0), (18.0, 4.0), (12.0, 3.0), (10.0, 2.5), (6.0, 1.5),
    (4.0, 1.0), (2.5, 0.6), (2.0, 0.5), (2.0, 0.5), (1.5, 0.4),
)  # fmt: skip
"""Down and up, in MB/s, of the ten clients of PR-FL's simulation (arXiv:2403.15439, public code)."""

PR_FL = Weather(links_sigma=0.3, draws=20, server_up_bytes_s=10e6, server_down_bytes_s=50e6, server_sigma=0.1)
"""Variation of the same simulation's devices and server."""


_LIKE: dict[str, tuple[Weather, tuple[LinkSettings, ...]]] = {
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


def read_weather(body: Mapping[str, object], path: Path) -> tuple[Weather, tuple[LinkSettings, ...]]:
    """The table [weather], and links for devices that have none of their own.

    Raises:
        ConfigError: A key is unknown or a value wrong; the message names it.
    """
    where, table = _table(body, "weather", path)
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
    where, table = _table(body, "availability", path, Availability)
    limits = {"period_s": (0.0, 1e9)}
    values = {k: validation.number(f"{where} {k}", v, *limits.get(k, (1e-6, 1.0))) for k, v in table.items()}
    try:
        return Availability(**values)
    except FedpruneError as error:
        raise ConfigError(where, expected=error.expected, got=error.got) from error


def read_dropouts(body: Mapping[str, object], path: Path) -> DropOuts:
    """The table [dropouts]; raises as `read_weather`."""
    where, table = _table(body, "dropouts", path, DropOuts)
    limits = {"probability": 1.0, "away_s": 1e12}
    values = {
        k: validation.number(f"{where} {k}", v, 0, limits[k], above=k == "away_s", below=True) for k, v in table.items()
    }
    return DropOuts(**values)


def read_settings(body: Mapping[str, object], path: Path) -> Settings:
    """The table [simulation]; raises as `read_weather`."""
    where, table = _table(body, "simulation", path, Settings)
    for key, value in table.items():
        if key == "cuda":
            validation.truth(f"{where} cuda", value)
        elif key == "densities":
            densities = validation.items(f"{where} densities", value, 1000, "numbers")
            table[key] = tuple(validation.number(f"{where} densities", v, 1e-6, 1) for v in densities)
        else:
            validation.whole(f"{where} {key}", value, 0 if key == "checkpoints" else 1, 10**6)
    return Settings(**table)


def _table(body: Mapping[str, object], name: str, path: Path, kind: type | None = None) -> tuple[str, dict[str, Any]]:
    """A table, empty if it isn't there, after its place; of a class's settings it may have no others."""
    where = f"{path}: [{name}]"
    table = body.get(name, {})
    if not isinstance(table, Mapping):
        raise ConfigError(where, expected=f"a table [{name}]", got=repr(table))
    return where, dict(table) if kind is None else validation.known(kind, table, where)
