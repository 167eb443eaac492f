"""The settings of a server: one declaration each, from which checks, options, variables and documentation derive.

They are groups that check themselves. What builds a feature takes its group alone, and a server's configuration is all
of them.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.errors import ConfigError, FedpruneError, value_text
from fedprune.jobs.job import Job
from fedprune.model.features import CUSTOM_LOSS
from fedprune.security.tls import SYSTEM_AUTHORITIES
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, MAX_PAYLOAD_BYTES, PACKET_OVERHEAD_BYTES
from fedprune.wire.topics import check_topic_name
from fedprune.wire.urls import BlobUrl
from fedprune_server.config.alert_settings import OFF, AlertSettings
from fedprune_server.config.cluster_url import PROCESSES, check_cluster_url
from fedprune_server.config.setting import check_settings, setting
from fedprune_server.config.track_targets import (
    TRACK_METAVAR,
    TRACK_TEXT,
    TrackTarget,
    anchor_track_folders,
    track_targets,
)
from fedprune_server.storage.s3.bucket import IN_FOLDER, parse_bucket_url

EMBEDDED = "embedded"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
ADDRESS_METAVAR = "[ADDRESS:]PORT"
MQTT, HTTPS, S3 = "mqtt", "https", "s3"

_COLLECTOR_URL = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]+(?:/[A-Za-z0-9_./-]*)?")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


@dataclass(frozen=True)
class JobSettings:
    """A job, its model and samples, and what each job of a server has of its own."""

    job: Job = field(default_factory=Job)
    model: str | None = setting(
        None, "An ONNX file, or a torch factory as `package.module:function`, with which the job begins.", "MODEL"
    )
    input_shape: tuple[int | str, ...] | None = setting(
        None,
        "One sample's shape, for a torch factory whose module doesn't state it, or an ONNX file with free sizes; "
        "`LEAST:MOST` for a length that varies.",
    )
    output: str | None = setting(
        None, "The output of an ONNX file from which the model is trained, or a value within it.", "NAME"
    )
    loss: str | None = setting(
        None,
        'A loss of your own, for recipe.loss = "custom": `package.module:function` of outputs and labels, or an ONNX '
        "file.",
        "LOSS",
    )
    metric: str | None = setting(
        None,
        'A metric of your own, for recipe.metric = "custom", in the forms of `loss`; a higher value is better.',
        "METRIC",
    )
    lora: str | None = setting(
        None,
        "Adapters to train; the weights are frozen: `RANK`, or `RANK:PATTERN,PATTERN` of names of "
        "linear layers' weights.",
        "RANK[:PATTERN,...]",
    )
    base: str | None = setting(
        None,
        "The precision in which frozen weights are stored, sent and loaded: `float16`, or `int8` with one scale per "
        "output channel.",
        "PRECISION",
    )
    evaluation: str | None = setting(
        None, "The server's own samples: a `.npz` file with x and y, or `package.module:function`.", "DATA"
    )
    calibration: str | None = setting(
        None,
        "Samples (labels aren't needed) on which batch-norm statistics are measured again, and on which `fedprune` "
        "can distil the global model.",
        "DATA",
    )
    database: str | None = setting(
        None,
        "A PostgreSQL database, as `postgresql+psycopg://user@host/name`; without it, SQLite in the state folder.",
        "URL",
    )
    blobs: str = setting(
        IN_FOLDER, "Where blobs are stored: `folder`, the state folder, or `s3://bucket/prefix`.", "URL"
    )
    cache_mib: int = setting(10240, "MiB of a bucket's blobs that the state folder caches.", within=(1, 10**9))
    pulls: int = setting(4, "Number of devices from which updates are pulled at the same time.", within=(1, 1000))
    workers: int = setting(1, "Number of processes that make submodels.", "N", within=(1, 1000))
    keep: int = setting(
        3, "How many of the latest global models are kept, beside the best by evaluation.", "N", within=(1, 10**6)
    )
    weight: float = setting(
        1.0,
        "The job's share of the boards, relative to the server's other jobs; 0 pauses it next to them.",
        "W",
        within=(0, 1000),
    )

    def check_job(self) -> None:
        """Raise `ConfigError` if settings don't fit together."""
        for name in ("loss", "metric"):
            if getattr(self, name) is not None and (recipe_choice := getattr(self.job.recipe, name)) != CUSTOM_LOSS:
                raise ConfigError(
                    ("model", name), expected=f"recipe.{name} = {CUSTOM_LOSS!r} with it", got=repr(recipe_choice),
                    hint=f"Say so in [job.recipe], or leave the {name} of your own out.",
                )  # fmt: skip
        if self.blobs != IN_FOLDER:
            parse_bucket_url(self.blobs)


@dataclass(frozen=True)
class BrokerSettings:
    """The broker, and the fleet at it."""

    broker: str = setting(
        EMBEDDED, "`embedded`, or a broker's address: `mqtts://host[:port]` or `mqtt://host[:port]`.", "URL"
    )
    ca: Path | None = setting(
        None,
        "Authorities that sign the certificate of a broker at `mqtts://`: a file, or `system` for the system's own; "
        "without it, the fleet's authority.",
        "FILE",
    )
    host: str = setting("127.0.0.1", "The address on which the embedded broker listens.", "ADDRESS")
    port: int | None = setting(
        None, "The embedded broker's port, 0 for a free one; without it 8883, or 1883 without TLS.", "PORT",
        within=(0, 65_535),
    )  # fmt: skip
    site: str = setting("default", "First part of the topics: a server and its devices are of one site.", "NAME")
    max_packet: int = setting(
        DEFAULT_MAX_PACKET,
        "Bytes of the largest MQTT packet that the broker accepts.",
        within=(LEAF_BYTES + PACKET_OVERHEAD_BYTES, MAX_PAYLOAD_BYTES + PACKET_OVERHEAD_BYTES),
    )
    on_revocation: str = setting(
        OFF,
        "A command that runs, without a shell, when the list of revoked certificates has changed; the variable "
        "`FEDPRUNE_CRL` names the list. `off` for none.",
    )

    @property
    def has_embedded_broker(self) -> bool:
        return self.broker == EMBEDDED

    def check_broker(self) -> None:
        """Raise `ConfigError` if settings are invalid, or don't fit together."""
        if self.broker != EMBEDDED and not self.broker.startswith(("mqtt://", "mqtts://")):
            raise ConfigError(
                ("server", "broker"),
                expected=f"{EMBEDDED!r} or mqtt://host[:port] or mqtts://...",
                got=repr(without_password(self.broker)),
            )
        if self.ca not in (None, SYSTEM_AUTHORITIES) and not Path(self.ca or "").is_file():
            expected = f"a file that exists, or {str(SYSTEM_AUTHORITIES)!r}"
            raise ConfigError(("server", "ca"), expected=expected, got=str(self.ca))
        if self.ca is not None and not self.broker.startswith("mqtts://"):
            raise ConfigError(
                ("server", "ca"), expected="a broker at mqtts://", got=repr(without_password(self.broker))
            )
        try:
            words = shlex.split(self.on_revocation)
        except ValueError:  # a quotation mark without its second
            words = []
        if not words or not self.on_revocation.isprintable():
            raise ConfigError(
                ("server", "on_revocation"), expected=f"a command, or {OFF!r}", got=value_text(self.on_revocation)
            )
        check_topic_name(self.site, ("server", "site"), error=ConfigError)


@dataclass(frozen=True)
class WebSettings(BrokerSettings, JobSettings):
    """How blobs travel: boards find this server's web server on the broker's host by default."""

    blob_url: str = setting(
        OFF, "A web address where boards find blobs, such as `https://models.example`; `off` for none.", "URL"
    )
    serve_blobs: str = setting(
        OFF,
        "Where this server itself serves blobs over HTTPS, by default on `host`; `off` for nowhere.",
        ADDRESS_METAVAR,
    )
    uploads: str = setting(
        MQTT,
        "How boards send updates: `mqtt`, `https` to this server's `serve_blobs`, or `s3` to the bucket of `blobs`. "
        "Boards that can't use the chosen way send them by MQTT.",
        "WAY",
        choices=(MQTT, HTTPS, S3),
    )

    @property
    def public_blob_url(self) -> str | None:
        """The web address where boards find blobs; None for none."""
        return None if self.blob_url == OFF else str(BlobUrl.parse(self.blob_url))

    @property
    def web_address(self) -> tuple[str, int] | None:
        """Address and port on which this server serves blobs; None if it does not."""
        return _listen_address(self.serve_blobs, self.host)

    def check_web(self) -> None:
        """Raise `ConfigError` if settings are invalid, or don't fit together."""
        if self.blob_url != OFF:
            try:
                BlobUrl.parse(self.blob_url)
            except FedpruneError as error:
                raise ConfigError(("server", "blob_url"), expected=error.expected, got=error.got) from error
        if _listen_address(self.serve_blobs, self.host) is None and self.uploads == HTTPS:
            raise ConfigError(
                ("server", "uploads"), expected=f"{MQTT!r}, or serve_blobs with it", got=repr(HTTPS),
                hint="Boards upload to the server's own web server: --serve-blobs [ADDRESS:]PORT.",
            )  # fmt: skip
        if self.uploads == S3 and self.blobs == IN_FOLDER:
            raise ConfigError(
                ("server", "uploads"), expected=f"{MQTT!r}, or blobs = 's3://...' with it", got=repr(S3),
                hint="Boards upload to the bucket of each job: --blobs s3://bucket/prefix.",
            )  # fmt: skip


@dataclass(frozen=True)
class WebConsoleSettings:
    """The console of operators."""

    console: str = setting(
        OFF, "Where operators see the fleet in a browser, by default on 127.0.0.1; `off` for nowhere.", ADDRESS_METAVAR
    )
    console_certificate: Path | None = setting(None, "The console's certificate with its chain, as PEM.")
    console_key: Path | None = setting(None, "The key of that certificate.")
    console_insecure: bool = setting(False, "The console may listen without TLS on an address that others can reach.")
    console_proxy: bool = setting(False, "A reverse proxy on this machine terminates TLS and forwards to the console.")
    console_hosts: str = setting(
        "localhost",
        "Host names, separated by commas, under which browsers may reach the console without TLS, and Prometheus the "
        "metrics.",
    )
    console_orders: str = setting(
        "all",
        "Which orders of operators are accepted: `none`, `look` for orders that change nothing, or `all`.",
        choices=("none", "look", "all"),
    )
    console_releases: Path | None = setting(None, "A folder of releases that operators may roll out.")

    @property
    def console_host_names(self) -> tuple[str, ...]:
        """The names in `console_hosts`, in small letters."""
        return tuple(host.strip().lower() for host in self.console_hosts.split(",") if host.strip())

    @property
    def console_address(self) -> tuple[str, int] | None:
        """Address and port of the console; None for none."""
        return _listen_address(self.console, LOOPBACK_HOSTS[0], "console")

    def check_console(self) -> None:
        """Raise `ConfigError` if settings are invalid, or passwords would travel in the open."""
        place = self.console_address
        if not all(_HOST_NAME.fullmatch(h.strip()) for h in self.console_hosts.split(",")):
            raise ConfigError(
                ("server", "console_hosts"), expected="names of hosts, with commas", got=value_text(self.console_hosts)
            )
        if self.console_releases is not None and not self.console_releases.is_dir():
            raise ConfigError(
                ("server", "console_releases"),
                expected="a folder that exists",
                got=value_text(str(self.console_releases)),
            )
        if (self.console_certificate is None) != (self.console_key is None):
            setting = "console_certificate" if self.console_key is None else "console_key"
            expected = "console_certificate and console_key, or neither"
            raise ConfigError(("server", setting), expected=expected, got="one of them")
        # A proxy is no exception: it is on this machine, and reaches the console at a loopback address.
        if place is None or self.console_certificate is not None or self.console_insecure:
            return
        if not is_loopback(place[0]):
            raise ConfigError(
                ("server", "console"), expected="an address of this machine alone, or TLS",
                got=value_text(self.console),
                hint="Passwords would travel in the open. Give console_certificate and console_key, put a reverse "
                "proxy in front of it, or, in a network of your own, set console_insecure.",
            )  # fmt: skip


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
        return _listen_address(self.metrics, LOOPBACK_HOSTS[0], "metrics")

    @property
    def tracker_targets(self) -> tuple[TrackTarget, ...]:
        """The experiment trackers that get every round."""
        return track_targets(self.track, ("server", "track"))

    def check_reports(self) -> None:
        """Raise `ConfigError` if settings are invalid."""
        _listen_address(self.metrics, LOOPBACK_HOSTS[0], "metrics")
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


# A server with several jobs reads these from each job's file; every other setting is the server's, and set once.
JOB_KEYS = tuple(f.name for f in fields(JobSettings))

# Settings of a job that stand in tables of their own instead of [server]: a simulation reads the same tables.
TABLE_KEYS = {name: ("model", name) for name in ("input_shape", "output", "loss", "metric", "lora", "base")} | {
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


def without_password(broker: str) -> str:
    scheme, separator, rest = broker.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen_address(text: str, host: str, name: str = "serve_blobs") -> tuple[str, int] | None:
    if text == OFF:
        return None
    address, colon, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or int(port) > 65_535 or (colon and not address):
        raise ConfigError(("server", name), expected=f"[ADDRESS:]PORT, or {OFF!r}", got=value_text(text))
    return address.strip("[]") or host, int(port)
