"""The settings of what a server listens on and connects to: the broker, the web server of blobs and the console."""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.errors import ConfigError, FedpruneError, value_text
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, MAX_PAYLOAD_BYTES, PACKET_OVERHEAD_BYTES
from fedprune.wire.topics import check_topic_name
from fedprune.wire.urls import SYSTEM_AUTHORITIES, BlobUrl
from fedprune_server.config.alert_settings import OFF
from fedprune_server.config.job_settings import JobSettings
from fedprune_server.config.setting import setting
from fedprune_server.storage.s3.bucket import IN_FOLDER

EMBEDDED = "embedded"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
ADDRESS_METAVAR = "[ADDRESS:]PORT"
MQTT, HTTPS, S3 = "mqtt", "https", "s3"

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")


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
        return listen_address(self.serve_blobs, self.host)

    def check_web(self) -> None:
        """Raise `ConfigError` if settings are invalid, or don't fit together."""
        if self.blob_url != OFF:
            try:
                BlobUrl.parse(self.blob_url)
            except FedpruneError as error:
                raise ConfigError(("server", "blob_url"), expected=error.expected, got=error.got) from error
        if listen_address(self.serve_blobs, self.host) is None and self.uploads == HTTPS:
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
        return listen_address(self.console, LOOPBACK_HOSTS[0], "console")

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


def without_password(broker: str) -> str:
    scheme, separator, rest = broker.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_address(text: str, host: str, name: str = "serve_blobs") -> tuple[str, int] | None:
    """Address and port of a setting [server] `name`, by default on `host`; None for `off`. Raises `ConfigError`."""
    if text == OFF:
        return None
    address, colon, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or int(port) > 65_535 or (colon and not address):
        raise ConfigError(("server", name), expected=f"[ADDRESS:]PORT, or {OFF!r}", got=value_text(text))
    return address.strip("[]") or host, int(port)
