"""What a server is told to do, and what of that makes no sense."""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import LEAF
from fedprune.core import validation
from fedprune.core.errors import ConfigError, FedpruneError, shown
from fedprune.jobs.job import Job
from fedprune.security.tls import SYSTEM
from fedprune.wire.blob_url import BlobUrl
from fedprune.wire.chunk import MAX_PACKET, MAX_PAYLOAD, PACKET_OVERHEAD
from fedprune.wire.topics import check_name
from fedprune_server.config.alert_settings import OFF, AlertSettings
from fedprune_server.config.cluster_url import PROCESSES, check_url
from fedprune_server.storage.s3.bucket import FOLDER, parse

EMBEDDED = "embedded"
LOCAL = ("127.0.0.1", "localhost", "::1")
LOG_FORMATS = ("text", "json")

_WEB = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]+(?:/[A-Za-z0-9_./-]*)?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server and its job.

    Attributes:
        job: The job.
        model: The ONNX file (or torch factory, as `package.module:factory`) with which the job begins; None if the
            state folder has it.
        input_shape: One sample's shape, where a torch factory's module doesn't say it; None else.
        evaluation: A `.npz` file or `package.module:function` with the server's own samples, or None.
        calibration: The same for samples on which batch-norm statistics are measured anew; without labels.
        site: First part of the topics: devices and servers of one site hear each other.
        broker: `embedded`, or the address of a broker such as `mqtt://broker:1883`.
        ca: A file of the authorities that vouch for a broker at `mqtts://`, or `system` for those of the system; the
            fleet's own authority where there is none.
        host: The address on which the embedded broker listens.
        port: Its port, 0 for a free one, None for the usual one: 8883, or without TLS 1883.
        state: The folder in which everything lies that must survive a crash.
        database: The database's URL; None for what the state folder says, at first SQLite in it.
        blobs: Where blobs are kept: `folder`, the state folder, or `s3://bucket/prefix`.
        cache_mib: MiB of blobs in a bucket that the state folder may hold, too.
        keep: How many of the latest global models are kept.
        archive: All models, updates and events are kept instead, for `fedprune-server replay`.
        pulls: From how many devices updates are pulled at the same time.
        receivers: Processes that take in updates, each so many at a time; 0 for the server's own alone.
        workers: Processes that make submodels; more than one pay where making one is dear.
        workers_url: Where helpers are: `processes`, or a Ray cluster, as `ray:auto` or `ray://host:10001`.
        profiles: A folder of hardware profiles of your own, beside the shipped ones.
        max_devices: How many devices may ever take part; announcements of further ones are ignored.
        slabs: What many devices pull is published once for all of them, where all of the site can read it.
        max_packet: Bytes of an MQTT packet that the broker lets through; a message is refused that is larger.
        blob_url: Where boards are told that blobs lie on the web; `off` for nowhere.
        serve_blobs: Where this server gives out blobs over HTTPS, as `[ADDRESS:]PORT`; `off` for nowhere.
        console: Where operators look at the server with a browser, as `[ADDRESS:]PORT`; `off` for nowhere. Without an
            address on this machine alone.
        console_certificate: A certificate for that, and those that vouch for it, as PEM; None for no TLS.
        console_key: Its key.
        console_insecure: It may listen without TLS where others than this machine reach it.
        console_proxy: A reverse proxy on this machine speaks for browsers, and does TLS.
        console_hosts: Names by which browsers may call it without TLS, with commas, beside addresses and `localhost`.
        console_orders: Which orders of operators are taken: `none`, `look` for those that change nothing, or `all`.
        console_releases: A folder of releases that operators may roll out; None for no releases.
        on_revocation: A command that is run once the list of revoked certificates has changed, without a shell; the
            environment's `FEDPRUNE_CRL` names the list. `off` for none.
        weight: The job's share of the boards in comparison with other jobs of the server; 0 to pause it beside them.
        board_logs: Lines of its log that each board may send in an hour; 0 for none.
        log_format: How the server's own log is written: `text` or `json`.
        metrics: Where this server gives figures to Prometheus, as `[ADDRESS:]PORT`; `off` for nowhere.
        alerts: Who is notified of alerts: the table [alerts].
        traces: Where spans of OpenTelemetry go, as `http://host:4318`; `off` for nowhere but what the environment says.
    """

    job: Job = field(default_factory=Job)
    model: str | None = None
    evaluation: str | None = None
    calibration: str | None = None
    site: str = "default"
    broker: str = EMBEDDED
    host: str = "127.0.0.1"
    port: int | None = None
    state: Path = Path("fedprune-state")
    keep: int = 3
    archive: bool = False
    pulls: int = 4
    workers: int = 1
    profiles: Path | None = None
    max_devices: int = 1000
    max_packet: int = MAX_PACKET
    ca: Path | None = None
    input_shape: tuple[int, ...] | None = None
    database: str | None = None
    slabs: bool = True
    blob_url: str = OFF
    serve_blobs: str = OFF
    blobs: str = FOLDER
    cache_mib: int = 10240
    workers_url: str = PROCESSES
    weight: float = 1.0
    receivers: int = 0
    board_logs: int = 60
    log_format: str = LOG_FORMATS[0]
    metrics: str = OFF
    traces: str = OFF
    console: str = OFF
    console_certificate: Path | None = None
    console_key: Path | None = None
    console_insecure: bool = False
    console_proxy: bool = False
    console_hosts: str = "localhost"
    console_orders: str = "all"
    console_releases: Path | None = None
    on_revocation: str = OFF
    alerts: AlertSettings = field(default_factory=AlertSettings)

    def __post_init__(self) -> None:
        if self.broker != EMBEDDED and not self.broker.startswith(("mqtt://", "mqtts://")):
            raise ConfigError(
                "server: broker",
                expected=f"{EMBEDDED!r} or mqtt://host[:port] or mqtts://...",
                got=repr(without_password(self.broker)),
            )
        for name, low, high in (
            ("keep", 1, 10**6),
            ("pulls", 1, 1000),
            ("receivers", 0, 64),
            ("workers", 1, 1000),
            ("max_devices", 1, 10**6),
            ("cache_mib", 1, 10**9),
            ("board_logs", 0, 100_000),
            ("max_packet", LEAF + PACKET_OVERHEAD, MAX_PAYLOAD + PACKET_OVERHEAD),
        ):
            validation.whole(f"server: {name}", getattr(self, name), low, high)
        if self.blobs != FOLDER:
            parse(self.blobs)
            if self.receivers:
                raise ConfigError(
                    "server: receivers", expected=f"0, or blobs = {FOLDER!r}", got=self.receivers,
                    hint="Receivers write into the state folder; with a bucket the server takes in updates by itself.",
                )  # fmt: skip
        check_url(self.workers_url)
        if self.port is not None:
            validation.whole("server: port", self.port, 0, 65_535)
        validation.number("server: weight", self.weight, 0.0, 1000.0)
        for name in SWITCHES:
            validation.truth(f"server: {name}", getattr(self, name))
        if self.profiles is not None and not self.profiles.is_dir():
            raise ConfigError("server: profiles", expected="a folder that exists", got=str(self.profiles))
        if self.ca not in (None, SYSTEM) and not Path(self.ca or "").is_file():
            raise ConfigError("server: ca", expected=f"a file that exists, or {str(SYSTEM)!r}", got=str(self.ca))
        if self.ca is not None and not self.broker.startswith("mqtts://"):
            raise ConfigError("server: ca", expected="a broker at mqtts://", got=repr(without_password(self.broker)))
        if self.blob_url != OFF:
            try:
                BlobUrl.parse(self.blob_url, "server: blob_url")
            except FedpruneError as error:
                raise ConfigError("server: blob_url", expected=error.expected, got=error.got) from error
        _place(self.serve_blobs, self.host)
        _place(self.metrics, LOCAL[0], "metrics")
        validation.word("server: log_format", self.log_format, LOG_FORMATS)
        if self.traces != OFF and not _WEB.fullmatch(self.traces):
            raise ConfigError(
                "server: traces",
                expected=f"http://host[:port] or https://..., without a user, or {OFF!r}",
                got=shown(self.traces.rpartition("@")[2]),
            )
        self._check_console()
        try:
            words = shlex.split(self.on_revocation)
        except ValueError:
            words = []
        if not words or not self.on_revocation.isprintable():
            raise ConfigError("server: on_revocation", expected=f"a command, or {OFF!r}", got=shown(self.on_revocation))
        if not self.host:
            raise ConfigError("server: host", expected="an address, such as 127.0.0.1 or 0.0.0.0", got="''")
        try:
            check_name(self.site, "site")
        except FedpruneError as error:
            raise ConfigError("server: site", expected=error.expected, got=error.got) from error

    @property
    def kept(self) -> int | None:
        """How many of the latest global models are kept, None for everything."""
        return None if self.archive else self.keep

    @property
    def embedded(self) -> bool:
        """Whether the server runs its own broker."""
        return self.broker == EMBEDDED

    @property
    def blobs_at(self) -> str | None:
        """Where blobs lie on the web, as boards are told; None where nobody said it."""
        return None if self.blob_url == OFF else str(BlobUrl.parse(self.blob_url))

    @property
    def web_place(self) -> tuple[str, int] | None:
        """The address and the port on which this server gives out blobs; None where it doesn't."""
        return _place(self.serve_blobs, self.host)

    @property
    def metrics_place(self) -> tuple[str, int] | None:
        """The address and the port on which this server gives out its figures; None where it doesn't."""
        return _place(self.metrics, LOCAL[0], "metrics")

    @property
    def console_place(self) -> tuple[str, int] | None:
        """The address and the port of the console; None where there is none."""
        return _place(self.console, LOCAL[0], "console")

    def _check_console(self) -> None:
        place = self.console_place
        validation.word("server: console_orders", self.console_orders, ("none", "look", "all"))
        if not all(_HOST.fullmatch(h.strip()) for h in self.console_hosts.split(",")):
            raise ConfigError(
                "server: console_hosts", expected="names of hosts, with commas", got=shown(self.console_hosts)
            )
        if self.console_releases is not None and not self.console_releases.is_dir():
            raise ConfigError(
                "server: console_releases", expected="a folder that exists", got=shown(str(self.console_releases))
            )
        if (self.console_certificate is None) != (self.console_key is None):
            raise ConfigError("server: console_certificate and console_key", expected="both of them", got="one")
        if place is None or self.console_certificate is not None or self.console_insecure:
            return
        if not is_loopback(place[0]):
            raise ConfigError(
                "server: console", expected="an address of this machine alone, or TLS", got=shown(self.console),
                hint="Passwords would travel in the open. Give console_certificate and console_key, put a reverse "
                "proxy in front of it, or, in a network of your own, set console_insecure.",
            )  # fmt: skip

    def server_settings(self) -> dict[str, Any]:
        """What the table [server] says, as JSON, with paths that hold in every folder; all but where that is kept."""
        values = {k: getattr(self, k) for k in SERVER if k not in ELSEWHERE}
        return {k: str(v if v == SYSTEM else v.resolve()) if isinstance(v, Path) else v for k, v in values.items()}


_OTHER_TABLES = ("job", "model", "input_shape", "evaluation", "calibration", "alerts")
_TYPES = {f.name: str(f.type) for f in fields(ServerConfig) if f.name not in _OTHER_TABLES}

SERVER = tuple(_TYPES)
"""Keys of the table [server]."""

TEXTS = tuple(name for name, kind in _TYPES.items() if "str" in kind or "Path" in kind)
SWITCHES = tuple(name for name, kind in _TYPES.items() if kind == "bool")

PATHS = tuple(name for name, kind in _TYPES.items() if kind == "Path | None")
"""Texts that name files and folders, in addition to `state`."""

ELSEWHERE = ("state", "database", "on_revocation")
"""Keys that the database doesn't keep: the state folder is or contains the first two, and a command must not be chosen
by writing to the database."""


def without_password(broker: str) -> str:
    """A broker's address as it may be shown."""
    scheme, mark, rest = broker.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _place(text: str, host: str, name: str = "serve_blobs") -> tuple[str, int] | None:
    if text == OFF:
        return None
    address, colon, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or int(port) > 65_535 or (colon and not address):
        raise ConfigError(f"server: {name}", expected=f"[ADDRESS:]PORT, or {OFF!r}", got=shown(text))
    return address.strip("[]") or host, int(port)
