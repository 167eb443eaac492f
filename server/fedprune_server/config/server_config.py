"""The settings of a server: one declaration each, from which checks, options, variables and documentation derive.

They are groups that check themselves. What builds a feature takes its group alone, and a server's configuration is all
of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError, value_text
from fedprune.wire.urls import SYSTEM_AUTHORITIES
from fedprune_export.model_options import ImportChoices
from fedprune_server.config.alert_settings import OFF, AlertSettings
from fedprune_server.config.cluster_url import PROCESSES, check_cluster_url
from fedprune_server.config.network_settings import (
    ADDRESS_METAVAR,
    LOOPBACK_HOSTS,
    WebConsoleSettings,
    WebSettings,
    listen_address,
)
from fedprune_server.config.setting import check_settings, setting
from fedprune_server.config.track_targets import (
    TRACK_METAVAR,
    TRACK_TEXT,
    TrackTarget,
    anchor_track_folders,
    track_targets,
)

_COLLECTOR_URL = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]+(?:/[A-Za-z0-9_./-]*)?")


@dataclass(frozen=True)
class ReportSettings:
    """Logs, metrics, traces, experiment trackers and alerts."""

    log_format: str = setting(
        "text", "The format of the server's log: `text`, or `json` for one object per line.", "FORMAT",
        choices=("text", "json"),
    )  # fmt: skip
    metrics: str = setting(
        OFF, "Where Prometheus reads metrics, by default on 127.0.0.1; `off` for nowhere.", ADDRESS_METAVAR
    )
    traces: str = setting(
        OFF,
        "Where spans go by OTLP, as `http://host:4318`; `off` for nowhere unless OpenTelemetry's variables name a "
        "collector.",
        "URL",
    )
    track: str = setting(OFF, TRACK_TEXT, TRACK_METAVAR)
    alerts: AlertSettings = field(default_factory=AlertSettings)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Address and port of the metrics; None for none."""
        return listen_address(self.metrics, LOOPBACK_HOSTS[0], "metrics")

    @property
    def tracker_targets(self) -> tuple[TrackTarget, ...]:
        """The experiment trackers that get every round."""
        return track_targets(self.track, ("server", "track"))

    def check_reports(self) -> None:
        """Raise `ConfigError` if settings are invalid."""
        listen_address(self.metrics, LOOPBACK_HOSTS[0], "metrics")
        if self.traces != OFF and not _COLLECTOR_URL.fullmatch(self.traces):
            raise ConfigError(
                ("server", "traces"),
                expected=f"http://host[:port] or https://..., without a user, or {OFF!r}",
                got=value_text(self.traces.rpartition("@")[2]),
            )
        track_targets(self.track, ("server", "track"))  # raises where the first round would fail otherwise


@dataclass(frozen=True)
class ServerConfig(ReportSettings, WebConsoleSettings, WebSettings):
    """Settings of a server and its job."""

    state: Path = setting(Path("fedprune-state"), "The folder of everything that must survive a crash.", "DIR")
    profiles: Path | None = setting(None, "A folder of further hardware profiles.", "DIR")
    max_devices: int = setting(
        1000, "Number of devices that may take part; announcements of further ones are ignored.", within=(1, 10**6)
    )
    connected: int = setting(
        0,
        "Number of boards that are connected on average; the others disconnect and come back in turn. 0: all stay "
        "connected.",
        "N",
        within=(0, 10**6),
    )
    workers_url: str = setting(
        PROCESSES, "Where workers run: `processes`, or a Ray cluster as `ray:auto` or `ray://host:10001`.", "URL"
    )

    def __post_init__(self) -> None:
        check_settings(self, ("server",))
        self.check_broker()
        self.check_job()
        self.check_web()
        self.check_console()
        self.check_reports()
        check_cluster_url(self.workers_url)
        if self.profiles is not None and not self.profiles.is_dir():
            raise ConfigError(("server", "profiles"), expected="a folder that exists", got=str(self.profiles))

    def server_settings(self) -> dict[str, Any]:
        """The table [server] as JSON, with absolute paths, except for `UNSTORED_KEYS`."""
        values = {k: getattr(self, k) for k in SERVER_KEYS if k not in UNSTORED_KEYS}
        values["track"] = anchor_track_folders(self.track, Path().resolve(), ("server", "track"))
        return {
            k: str(v if v == SYSTEM_AUTHORITIES else v.resolve()) if isinstance(v, Path) else v
            for k, v in values.items()
        }


# Settings of a job that stand in tables of their own instead of [server]: a simulation reads the same tables.
TABLE_KEYS = {choice.name: ("model", choice.name) for choice in fields(ImportChoices)} | {
    "model": ("model", "path"),
    "evaluation": ("evaluation", "data"),
    "calibration": ("calibration", "data"),
}

_SERVER_FIELD_TYPES = {
    f.name: str(f.type) for f in fields(ServerConfig) if f.name not in ("job", "alerts", *TABLE_KEYS)
}

# Derived, so that a new setting needs one declaration: it is a key of [server] unless it has a table of its own.
SERVER_KEYS = tuple(_SERVER_FIELD_TYPES)

# Settings that name files and folders, in addition to `state`, which has a default: relative paths in a file count
# from the file's folder.
PATH_SETTINGS = tuple(name for name, kind in _SERVER_FIELD_TYPES.items() if kind == "Path | None")

# Keys that the database doesn't keep: the state folder is or contains the first two, and a command must not be chosen
# by writing to the database.
UNSTORED_KEYS = ("state", "database", "on_revocation")
