"""Addresses of brokers, their TLS context, and reasons why one can't be reached."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedprune.core.errors import ConfigError, FedpruneError


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
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError("broker URL", expected="mqtt://[user:password@]host[:port]") from error
        if "://" not in url:
            shown = url.rpartition("@")[2][:200]  # without a password
            raise ConfigError("broker URL", expected="mqtts://host[:port]", got=shown, hint=f"Try mqtts://{shown}.")
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/") or port == 0:
            raise ConfigError(
                "broker URL",
                expected="mqtt://[user:password@]host[:port] or mqtts://...",
                got=f"scheme {parts.scheme!r}, host {parts.hostname!r}",
            )
        tls = parts.scheme == "mqtts"
        return cls(
            parts.hostname,
            port or (8883 if tls else 1883),
            tls,
            unquote(parts.username) if parts.username is not None else None,
            unquote(parts.password) if parts.password is not None else None,
        )

    @property
    def bare(self) -> str:
        """The URL without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"BrokerUrl({self})"


def tls_context(ca: Path | None = None) -> ssl.SSLContext:
    """A client's TLS context with these authorities, by default the system's. Raises `ConfigError` if the file can't be
    used."""
    try:
        return ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    except OSError as error:
        raise ConfigError(f"can't use the CA file {ca}: {error}") from error


def failure(error: OSError | FedpruneError) -> str:
    """The reason why a broker can't be reached, for people."""
    if isinstance(error, FedpruneError):
        return str(error)
    if isinstance(error, socket.gaierror):
        return f"the host name is unknown ({error.strerror})"
    if isinstance(error, ssl.SSLCertVerificationError) and error.reason == "CERTIFICATE_VERIFY_FAILED":
        why = error.verify_message or "unknown authority"
        return f"TLS failed (its certificate is not trusted: {why}; --ca names the authorities to trust)"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or error})"
    if isinstance(error, TimeoutError):
        return "no answer"
    return (error.strerror or str(error) or type(error).__name__).lower()
