"""The simulated environment: varying links and boards, the server's own link, devices that disconnect.

Random numbers are keyed by the job's seed and their purpose, so a run doesn't depend on the order of events. Speeds
vary by the mean of log-normal draws (PR-FL's simulation: 20 draws, σ = 0.3 for devices and 0.1 for the server).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedprune.core import validation
from fedprune.core.errors import ConfigError, value_text
from fedprune.core.rng import keyed_generator
from fedprune.planning.profile import LinkFigures
from fedprune_server.config.setting import check_settings, read_table, setting
from fedprune_server.simulation.fleet.device_table import MEGABYTE, LinkSettings

NEVER_CLOSES = math.inf  # end of a window that never closes


@dataclass(frozen=True)
class DropOuts:
    """Devices that disconnect during a round: the table [dropouts]."""

    probability: float = setting(
        0.0, "Probability that a device disconnects while it works on an offer.", within=(0, 1), below=True
    )
    away_s: float = setting(60.0, "Mean virtual seconds until it reconnects.", within=(0, 1e12), above=True)

    def __post_init__(self) -> None:
        check_settings(self, ("dropouts",))


@dataclass(frozen=True)
class Availability:
    """Periodic windows in which devices are connected, such as the hours in which they are plugged in: the table
    [availability].

    Each device has its own phase, and its own share of the period between `least` and `most`.
    """

    period_s: float = setting(0.0, "Period in seconds; 0 for devices that are always connected.", within=(0, 1e9))
    least: float = setting(1.0, "Smallest share of the period.", within=(0, 1), above=True)
    most: float = setting(1.0, "Largest share.", within=(0, 1), above=True)

    def __post_init__(self) -> None:
        check_settings(self, ("availability",))
        if self.least > self.most:
            raise ConfigError(("availability", "least"), expected=f"at most {self.most:g}, as most is", got=self.least)

    def next_window(self, seed: int, device: str, now: float) -> tuple[float, float]:
        """Begin and end of the window that is open at this time, or of the next window.

        The window of a device that is always connected begins now and never ends.
        """
        period = self.period_s
        # Not keyed by time or round: phase and share are the device's own for the whole run.
        rng = keyed_generator(seed, device, "availability")
        phase, share = rng.random() * period, self.least + (self.most - self.least) * rng.random()
        if not period or share >= 1:
            return now, NEVER_CLOSES
        # From the period that has begun; rounding may put it one too early, so the loop looks again.
        periods = math.floor((now - phase) / period)
        while now >= phase + periods * period + share * period:
            periods += 1
        opens_at = phase + periods * period
        return opens_at, opens_at + share * period


@dataclass(frozen=True)
class Weather:
    """Variation of devices and links, and the capacity of the server's link: the table [weather]."""

    links_sigma: float = setting(
        0.0, "σ of the log-normal factor on a device's link speed, drawn for every round and direction.", within=(0, 3)
    )
    compute_sigma: float = setting(0.0, "σ of the factor on its training speed, drawn for every round.", within=(0, 3))
    links_spread: float = setting(
        0.0, "σ of a factor on both link speeds of a device, constant over the run.", within=(0, 3)
    )
    compute_spread: float = setting(0.0, "σ of a factor on its training speed, constant over the run.", within=(0, 3))
    draws: int = setting(1, "Number of draws whose mean is a round's factor.", within=(1, 10_000))
    server_up_mb_s: float = setting(
        0.0, "MB/s that the server can send to all devices together; 0 for no limit.", within=(0, 1e6)
    )
    server_down_mb_s: float = setting(0.0, "MB/s that it can receive; 0 for no limit.", within=(0, 1e6))
    server_sigma: float = setting(0.0, "σ of the factor on both in a round.", within=(0, 3))
    server_cache: bool = setting(
        False, "Whether devices download through a cache, to which the server sends each file of a round once."
    )

    def __post_init__(self) -> None:
        check_settings(self, ("weather",))

    def link_factor(self, seed: int, number: int, device: str, direction: str) -> float:
        """Factor on a device's link speed in a round; `direction` is `down` or `up`."""
        constant_factor = self._constant_factor(seed, device, "links", self.links_spread)
        return constant_factor * self._round_factor(self.links_sigma, seed, number, device, direction)

    def compute_factor(self, seed: int, number: int, device: str) -> float:
        """Factor on a device's training speed in a round."""
        constant_factor = self._constant_factor(seed, device, "compute", self.compute_spread)
        return constant_factor * self._round_factor(self.compute_sigma, seed, number, device, "compute")

    def rates(self, seed: int, number: int, device: str, link: LinkFigures, direction: str) -> tuple[float, float]:
        """Capacities of a device's link and of the server's in a round, in bytes/s."""
        speed = link.down_bytes_s if direction == "down" else link.up_bytes_s
        rate = speed * self.link_factor(seed, number, device, direction)
        # Seen from the server, devices' downloads go up.
        limit = MEGABYTE * (self.server_up_mb_s if direction == "down" else self.server_down_mb_s) or math.inf
        limit *= self._round_factor(self.server_sigma, seed, number, "server", direction)
        return rate, limit

    def _round_factor(self, sigma: float, seed: int, number: int, name: str, quantity: str) -> float:
        if not sigma:
            return 1.0
        return float(keyed_generator(seed, number, name, quantity, "weather").lognormal(0.0, sigma, self.draws).mean())

    @staticmethod
    def _constant_factor(seed: int, device: str, quantity: str, sigma: float) -> float:
        return float(keyed_generator(seed, device, quantity, "spread").lognormal(0.0, sigma)) if sigma else 1.0


def transfer_end(now: float, free: float, size: int, rate: float, limit: float) -> tuple[float, float]:
    """Transfer bytes over the server's link, first come first served, and over a device's link (PR-FL's simulation).

    While a slow device still receives the end of one transfer, the server's link already serves the next. Returns the
    time of arrival of the last byte, and the new time at which the server's link is free.

    `now`: time at which the bytes are ready, in seconds; `free`: time at which the server's link is free; `size`:
    bytes; `rate`: capacity of the device's link, in bytes/s; `limit`: capacity of the server's link, in bytes/s.
    """
    starts_at = max(now, free)
    return starts_at + size / min(rate, limit), starts_at + size / limit


def cached_transfer_end(
    now: float, free: float, sizes: Mapping[str, int], rate: float, limit: float, cached: dict[str, float]
) -> tuple[float, float]:
    """Send a device files, one after the other, through a cache (PR-FL's simulation); otherwise as `transfer_end`.

    Args:
        sizes: Bytes of each file.
        cached: When the cache had the last byte of each file that it has; new ones are added.
    """
    arrives_at = now
    for name, size in sizes.items():
        if name not in cached:
            free = cached[name] = max(now, free) + size / limit
        # The cache passes on what it has got so far.
        arrives_at = max(max(arrives_at, cached[name] - size / limit) + size / rate, cached[name])
    return arrives_at, free


# Down and up, in MB/s, of the ten clients of PR-FL's simulation (arXiv:2403.15439, public code).
PR_FL_LINKS = (
    (20.0, 5.0), (18.0, 4.0), (12.0, 3.0), (10.0, 2.5), (6.0, 1.5),
    (4.0, 1.0), (2.5, 0.6), (2.0, 0.5), (2.0, 0.5), (1.5, 0.4),
)  # fmt: skip

# Variation of the same simulation's devices and server.
PR_FL_WEATHER = Weather(
    links_sigma=0.3, draws=20, server_up_mb_s=10.0, server_down_mb_s=50.0, server_sigma=0.1, server_cache=True
)


# Environments of published simulations.
_PUBLISHED_ENVIRONMENTS: dict[str, tuple[Weather, tuple[LinkSettings, ...]]] = {
    "pr-fl": (PR_FL_WEATHER, tuple({"down_mb_s": down, "up_mb_s": up, "latency_s": 0.0} for down, up in PR_FL_LINKS))
}


def read_weather(body: Mapping[str, object]) -> tuple[Weather, tuple[LinkSettings, ...]]:
    """The table [weather], and links for devices that have none of their own. Raises `ConfigError` if a key is unknown
    or a value wrong; the message names it."""
    path, weather_table = ("weather",), body.get("weather", {})
    if not isinstance(weather_table, Mapping):
        raise ConfigError(path, expected="a table", got=value_text(weather_table))
    table = dict(weather_table)
    environment = table.pop("like", None)
    if environment is not None:
        validation.check_word((*path, "like"), environment, tuple(_PUBLISHED_ENVIRONMENTS))
    weather, links = _PUBLISHED_ENVIRONMENTS[environment] if isinstance(environment, str) else (Weather(), ())
    return read_table(Weather, vars(weather) | table, path), links
