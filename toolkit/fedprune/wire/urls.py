"""Addresses of brokers, and of the web servers from which boards fetch blobs and to which they upload updates.

A blob has the same path as in a blob store's folder (`fedprune.blobs.blob_store`), so that any web server in front of
one suffices: `{base}/{first two digits}/{sha256}`, and the same with `.leaves` for the file of the leaf table
(`fedprune.blobs.blob_ref`).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedprune.blobs.blob_ref import TABLE_SUFFIX
from fedprune.core.errors import ConfigError, ProtocolError, value_text

# Characters of an address of blobs.
MAX_URL = 512

# Characters of an address for one upload, which may hold a signature and a token.
MAX_UPLOAD_URL = 4096

# In place of an authority's path: trust all authorities that the system trusts, for hosted brokers.
SYSTEM_AUTHORITIES = Path("system")

# Hosts that may be reached without TLS: this machine.
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_SERVER_PATTERN = (
    r"(?P<scheme>https?)://(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[A-Za-z0-9.-]{1,253}))"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
)
_BLOB_URL = re.compile(_SERVER_PATTERN + r"(?P<path>(?:/[A-Za-z0-9._~-]{1,255})*)/?")
_UPLOAD_URL = re.compile(
    _SERVER_PATTERN + r"(?P<path>/[A-Za-z0-9._~!&'()*+,;=:@%/-]*)(?P<query>(?:\?[A-Za-z0-9._~!&'()*+,;=:@%/?-]*)?)"
)
# The same patterns for JSON Schema, whose regular expressions know no named groups of Python's form.
URL_PATTERN, UPLOAD_PATTERN = (re.sub("[?]P<[a-z]+>", "?:", url.pattern) for url in (_BLOB_URL, _UPLOAD_URL))

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_DEFAULT_PORTS = {True: 443, False: 80}
_BLOB_URL_FORM = "https://host[:port][/path], or http:// for this machine alone, without user, query or fragment"


@dataclass(frozen=True)
class WebServer:
    """A web server's address: `host` is in lower case. Only this machine may do without TLS."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.tls] else f":{self.port}"
        return f"{'https' if self.tls else 'http'}://{host}{port}"


@dataclass(frozen=True)
class BlobUrl(WebServer):
    """The address of a web server with blobs: `path` is empty, or with a leading and no trailing slash."""

    path: str

    @classmethod
    def parse(cls, url: object, where: str = "address of blobs") -> BlobUrl:
        """Read https://host[:port][/path]; http:// for this machine alone. Raises `ProtocolError`, which names
        `where`."""
        match = _BLOB_URL.fullmatch(url) if isinstance(url, str) and len(url) <= MAX_URL else None
        server = None if match is None else _web_server(match)
        if match is None or server is None:
            shortened = url.rpartition("@")[2] if isinstance(url, str) else url  # without a password
            what = f"{_BLOB_URL_FORM}, of at most {MAX_URL} characters"
            raise ProtocolError(where, expected=what, got=value_text(shortened))
        if not server.tls and server.host not in LOOPBACK:
            raise ProtocolError(where, expected="https://, since it is not on this machine", got=value_text(url))
        return cls(server.host, server.port, server.tls, match["path"])

    def __str__(self) -> str:
        return f"{super().__str__()}{self.path}"

    def blob(self, sha256: str) -> str:
        return f"{self.path}/{sha256[:2]}/{sha256}"

    def table(self, sha256: str) -> str:
        return self.blob(sha256) + TABLE_SUFFIX


@dataclass(frozen=True)
class UploadUrl(WebServer):
    """The address of one upload. Whoever knows `query` may upload, so `str`, `repr` and errors leave it out."""

    path: str
    query: str = field(repr=False)

    @classmethod
    def parse(cls, url: object, where: str = "address of an upload") -> UploadUrl:
        """Read https://host[:port]/path[?query]; http:// for this machine alone. Raises `ProtocolError`, which names
        `where`."""
        match = _UPLOAD_URL.fullmatch(url) if isinstance(url, str) and len(url) <= MAX_UPLOAD_URL else None
        server = None if match is None else _web_server(match)
        if match is None or server is None or not (server.tls or server.host in LOOPBACK):
            what = "https://host[:port]/path, or http:// for this machine alone"
            raise ProtocolError(where, expected=f"{what}, of at most {MAX_UPLOAD_URL} characters", got="another")
        return cls(server.host, server.port, server.tls, match["path"], match["query"])

    @property
    def target(self) -> str:
        """Path and query, as a request names them."""
        return self.path + self.query

    def __str__(self) -> str:
        return f"{super().__str__()}{self.path}"


def _web_server(match: re.Match[str]) -> WebServer | None:
    """The server in an address of the right form; None if no server can have that host, port or path."""
    tls = match["scheme"] == "https"
    host = _ip_address(match["six"], 6) if match["six"] is not None else _host_name(match["host"].lower())
    port = int(match["port"] or _DEFAULT_PORTS[tls])
    if host is None or port > 65_535 or any(segment in (".", "..") for segment in match["path"].split("/")):
        return None
    return WebServer(host, port, tls)


def _host_name(host: str) -> str | None:
    """The host if it is a DNS name or an IPv4 address, else None."""
    labels = host.split(".")
    # Some programs read such a name as a number, and connect to that IPv4 address.
    if labels[-1].isdecimal() or labels[-1].startswith("0x"):
        return _ip_address(host, 4)
    return host if all(_LABEL.fullmatch(label) for label in labels) else None


def _ip_address(host: str, version: int) -> str | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return str(address) if address.version == version else None


@dataclass(frozen=True)
class BrokerUrl:
    """A broker's address; the password is never part of an error or of repr."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> BrokerUrl:
        """Read mqtt://[user:password@]host[:port] or mqtts://... Raises `ConfigError` if it has another form."""
        try:
            split = urlsplit(url)
            port = split.port
        except ValueError as error:
            raise ConfigError(
                "broker URL",
                expected="mqtt://[user:password@]host[:port]",
                hint="A port is a number from 1 to 65535, and an IPv6 address is written in brackets.",
            ) from error
        if "://" not in url:
            visible_url = url.rpartition("@")[2][:200]  # without a password
            raise ConfigError(
                "broker URL", expected="mqtts://host[:port]", got=visible_url, hint=f"Try mqtts://{visible_url}."
            )
        if split.scheme not in ("mqtt", "mqtts") or not split.hostname or split.path.strip("/") or port == 0:
            form = "mqtt://[user:password@]host[:port] or mqtts://..."
            raise ConfigError("broker URL", expected=form, got=f"scheme {split.scheme!r}, host {split.hostname!r}")
        tls = split.scheme == "mqtts"
        return cls(
            split.hostname,
            port or (8883 if tls else 1883),
            tls,
            unquote(split.username) if split.username is not None else None,
            unquote(split.password) if split.password is not None else None,
        )

    @property
    def without_credentials(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"BrokerUrl({self})"
