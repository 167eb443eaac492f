"""The console's part of the server's loop, and the checks of its settings before it starts."""

from __future__ import annotations

import importlib.util
import logging
import socket
import ssl
import time
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from typing import Any

from cryptography.x509 import load_pem_x509_certificate

from fedprune.core.errors import ConfigError, FedpruneError, MissingExtraError, reason
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.view import JobView
from fedprune_server.web.process import ConsoleProcess
from fedprune_server.web.state.order_handler import OrderHandler
from fedprune_server.web.state.publisher import StatusPublisher

log = logging.getLogger("fedprune.server")

_PACKAGES = ("argon2", "jinja2", "starlette", "uvicorn")

EVERY_S = 0.5
"""Pause between two turns of the console, in the server's loop."""

COMPLAIN_S = 60.0


class ConsoleObserver(Observer):
    """Publishes the server's status, takes orders and keeps the console's process running, in the server's loop.

    A failure is logged, once a minute at most, and costs the jobs nothing.
    """

    def __init__(
        self,
        publisher: StatusPublisher,
        orders: OrderHandler,
        process: ConsoleProcess | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publisher, self._orders, self._process, self._monotonic = publisher, orders, process, monotonic
        self._next_at = self._complain_at = 0.0

    def noticed(self, devices: Collection[str]) -> None:
        self._publisher.changed(devices)

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        self._safely(lambda: self._publisher.round_over(seen.job.name, summary))

    def turned(self, seconds: Callable[[], float] | None, seen: JobView | None) -> None:
        now = self._monotonic()
        if now < self._next_at:
            return
        self._next_at = now + EVERY_S
        if self._process is not None:
            self._process.turn(now)
        self._safely(self._orders.turn)
        self._safely(self._publisher.publish)
        faults, self._publisher.faults = self._publisher.faults, []
        if faults:
            self._complain(faults[0])

    def waiting(self) -> None:
        """Show why nothing goes on; orders wait for the loop's next turn."""
        now = self._monotonic()
        if now >= self._next_at:
            self._next_at = now + EVERY_S
            self._safely(self._publisher.publish)

    def close(self) -> None:
        if self._process is not None:
            self._process.stop()
        self._safely(self._orders.close)  # the console's process doesn't write to its database any more

    def _safely(self, act: Callable[[], None]) -> None:
        try:
            act()
        except FedpruneError as error:
            self._complain(str(error))
        except Exception as error:  # noqa: BLE001 - an observer must not end what it observes
            self._complain(f"{type(error).__name__}: {reason(error)}")

    def _complain(self, text: str) -> None:
        now = self._monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_S
            log.error("the console isn't up to date: %s", text)


def check_console(config: ServerConfig) -> None:
    """Check the console's settings; its port may still be in use. Raises `MissingExtraError` if the packages of the
    extra `console` are missing; and `ConfigError` if the address is not this machine's, or a certificate can't be
    used."""
    if config.console_place is None:
        return
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingExtraError(f"the console needs {', '.join(missing)}", extra="console")
    check_tls(config)
    check_free(config.console_place[0], 0)


def check_free(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ConfigError(
            f"can't listen on {address}:{port}: {reason(error)}",
            path=("server", "console"),
            hint="Choose another port, or an address of this machine.",
        ) from error


def check_tls(config: ServerConfig) -> None:
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
            f"with console_key: {reason(error)}",
            path=("server", "console_certificate"),
            expected="a certificate and its key as PEM, the key without a password",
            got=f"{config.console_certificate} and {config.console_key}",
        ) from error
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(timezone.utc)
    if now < begins:
        log.error(
            "server.console_certificate: %s counts from %s UTC only, and it is %s here: browsers refuse it until "
            "then. See that this machine's clock is right",
            config.console_certificate,
            f"{begins:%Y-%m-%d %H:%M}",
            f"{now:%Y-%m-%d %H:%M}",
        )
    elif ends < now:
        raise ConfigError(
            f"{config.console_certificate}",
            path=("server", "console_certificate"),
            expected=f"a certificate that counts today, {now:%Y-%m-%d %H:%M} UTC",
            got=f"one from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC",
            hint="Browsers refuse it. Put another there, see that this machine's clock is right, or do without: "
            "--console off.",
        )
