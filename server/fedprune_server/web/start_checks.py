"""Checks the console's settings before the server starts: packages, address and certificate."""

from __future__ import annotations

import importlib.util
import logging
import socket
import ssl
from datetime import datetime, timezone

from cryptography.x509 import load_pem_x509_certificate

from fedprune.core.errors import ConfigError, MissingExtraError, error_reason
from fedprune_server.config.network_settings import WebConsoleSettings

log = logging.getLogger("fedprune.server")

_NEEDED_PACKAGES = ("argon2", "jinja2", "starlette", "uvicorn")


def check_console(config: WebConsoleSettings) -> None:
    """Check the console's settings, but not whether its port is free: a former server may still use it.

    Raises `MissingExtraError` if packages of the extra `console` are missing, and `ConfigError` if the address is not
    this machine's or the certificate can't be used.
    """
    if config.console_address is None:
        return
    if missing := [name for name in _NEEDED_PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(f"the console needs {', '.join(missing)}", extra="console")
    check_tls(config)
    check_address_free(config.console_address[0], 0)


def check_address_free(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ConfigError(
            f"can't listen on {address}:{port}: {error_reason(error)}",
            path=("server", "console"),
            hint="Choose another port, or an address of this machine.",
        ) from error


def check_tls(config: WebConsoleSettings) -> None:
    """Check that browsers accept the console's certificate now.

    One that isn't valid yet is only logged: after a power cut a machine's clock may be set once the server runs.
    """
    if config.console_certificate is None or config.console_key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.console_certificate, config.console_key, password=lambda: ""
        )
        certificate = load_pem_x509_certificate(config.console_certificate.read_bytes())
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"with console_key: {error_reason(error)}",
            path=("server", "console_certificate"),
            expected="a certificate and its key as PEM, the key without a password",
            got=f"{config.console_certificate} and {config.console_key}",
        ) from error
    valid_from, valid_until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(timezone.utc)
    if now < valid_from:
        log.error(
            "server.console_certificate: %s counts from %s UTC only, and it is %s here: browsers refuse it until "
            "then. See that this machine's clock is right",
            config.console_certificate,
            f"{valid_from:%Y-%m-%d %H:%M}",
            f"{now:%Y-%m-%d %H:%M}",
        )
    elif valid_until < now:
        raise ConfigError(
            f"{config.console_certificate}",
            path=("server", "console_certificate"),
            expected=f"a certificate that counts today, {now:%Y-%m-%d %H:%M} UTC",
            got=f"one from {valid_from:%Y-%m-%d %H:%M} to {valid_until:%Y-%m-%d %H:%M} UTC",
            hint="Browsers refuse it. Put another there, see that this machine's clock is right, or do without: "
            "--console off.",
        )
