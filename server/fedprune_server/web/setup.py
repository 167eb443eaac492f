"""Starts a server's console, if its configuration asks for one."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

from cryptography.x509 import load_pem_x509_certificate

from fedprune import __version__
from fedprune.core.errors import ConfigError, FedpruneError, MissingExtraError, reason
from fedprune_server.config.server_config import ServerConfig, without_password
from fedprune_server.devices.board_logs import BoardLogs
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.server import Server
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.messaging.connection import Connection
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.view import JobView
from fedprune_server.ota.store import RolloutStore
from fedprune_server.web.database import FILE, ConsoleDatabase
from fedprune_server.web.process import ConsoleProcess, ConsoleSettings
from fedprune_server.web.state import status
from fedprune_server.web.state.admin_executor import AdminExecutor
from fedprune_server.web.state.logs import BoardLogTap
from fedprune_server.web.state.order_handler import OrderHandler
from fedprune_server.web.state.order_queue import OrderQueue
from fedprune_server.web.state.publisher import ServedJobs, StatusPublisher
from fedprune_server.web.state.surroundings import Members, ReleaseWatch, SurroundingsPoller

log = logging.getLogger("fedprune.server")

_PACKAGES = ("argon2", "fastapi", "jinja2", "uvicorn")


EVERY_S = 0.5
"""Pause between two turns of the console, in the server's loop."""

COMPLAIN_S = 60.0


class ConsoleObserver(Observer):
    """Publishes the server's status, takes orders and keeps the console's process running, in the server's loop.

    What fails here is logged, once a minute at most, and costs the jobs nothing.

    Args:
        publisher: Publishes the status.
        orders: Takes orders.
        process: The console's process.
        monotonic: Monotonic clock.
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
        """Do everything, if it is time."""
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

    def close(self) -> None:
        self._orders.close()
        if self._process is not None:
            self._process.stop()

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


def jobs_of(server: Server) -> tuple[list[JobRunner], Callable[[str], str | None], Callable[[str], bool] | None]:
    """The jobs of a server and, where there are several, which of them has a device, and whether it is connected."""
    runners = list(server.runners.values())
    return (runners, server.holder, server.present) if len(runners) > 1 else (runners, lambda device: None, None)


@contextmanager
def with_console(
    config: ServerConfig,
    reached: Connection,
    identity: IdentityFolder | None,
    server: Server,
    *,
    releases_given: bool,
    logs: BoardLogs | None = None,
    alerts: AlertBook | None = None,
) -> Iterator[None]:
    """Run a console for a server, if its configuration, which `check_console` has checked, asks for one.

    Args:
        config: The configuration.
        reached: The server's connection.
        identity: The server's; None for one without.
        server: The server.
        releases_given: Whether this server gives boards releases.
        logs: Logs of boards.
        alerts: The open alerts.

    Raises:
        ConfigError: The port is in use.
        StorageError: A database can't be used.
    """
    place = config.console_place
    if place is None:
        yield
        return
    desks, holder, present = jobs_of(server)
    with ExitStack() as stack:
        check_free(*place)
        members = releases = executor = None
        if identity is not None:
            store = IdentityStore(identity.path / "identity.db", read_only=True)
            stack.callback(store.close)
            members, executor = Members(store, identity.behind), AdminExecutor(config.state, config.console_releases)
            if releases_given:
                releases = ReleaseWatch(stack.enter_context(RolloutStore(config.state)))
        poller = SurroundingsPoller(members, releases, tuple if executor is None else executor.names)
        stack.callback(poller.close)
        poller.start()
        from fedprune_server.web.auth.accounts import Accounts

        database = stack.enter_context(ConsoleDatabase(config.state / FILE))
        if len(Accounts(database)) == 0:
            log.warning(
                "no operator can log in to the console yet: fedprune-server operators add NAME --role admin --state %s",
                config.state,
            )
        boards = None
        if logs is not None:
            boards = BoardLogTap(config.state)
            logs.told = boards.hear
        writer = status.StatusWriter(config.state / status.FILE)
        stack.callback(writer.close)
        publisher = StatusPublisher(
            ServedJobs([d.view for d in desks], holder, present), _site(config, reached, identity), writer,
            poller=poller, boards=boards, alerts=alerts,
        )  # fmt: skip
        handler = OrderHandler(OrderQueue(database), publisher, executor, config.console_orders)
        observer = ConsoleObserver(publisher, handler, ConsoleProcess(_settings(config, *place)))
        stack.callback(observer.close)
        for desk in desks:
            desk.observers.join(observer)
        logger = logging.getLogger("fedprune")
        logger.addHandler(publisher.tap)
        stack.callback(logger.removeHandler, publisher.tap)
        yield


def check_console(config: ServerConfig) -> None:
    """Check the console's settings; its port may still be in use.

    Raises:
        MissingExtraError: The packages of the extra `console` are missing.
        ConfigError: The address is not this machine's, or the certificate can't be used.
    """
    if config.console_place is not None:
        check_packages()
        check_tls(config)
        check_free(config.console_place[0], 0)


def check_packages(packages: Sequence[str] = _PACKAGES) -> None:
    """Check that the extra `console` is installed.

    Raises:
        MissingExtraError: It isn't.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"the console needs {', '.join(missing)}", extra="console")


def check_free(address: str, port: int) -> None:
    """Check that an address can be listened on.

    Raises:
        ConfigError: It can't.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ConfigError(
            f"[server] console: can't listen on {address}:{port}: {reason(error)}", hint="Choose another place."
        ) from error


def check_tls(config: ServerConfig) -> None:
    """Check that the console's certificate and key can be used now.

    Raises:
        ConfigError: They can't, or the certificate has ended, so that browsers refuse it. One that doesn't count yet is
            an error in the log alone: after a power cut a machine's clock may be set only once the server runs.
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
            f"[server] console_certificate and console_key: {reason(error)}",
            expected="a certificate and its key as PEM, the key without a password",
            got=f"{config.console_certificate} and {config.console_key}",
        ) from error
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(timezone.utc)
    if now < begins:
        log.error(
            "[server] console_certificate: %s counts from %s UTC only, and it is %s here: browsers refuse it until "
            "then. See that this machine's clock is right",
            config.console_certificate,
            f"{begins:%Y-%m-%d %H:%M}",
            f"{now:%Y-%m-%d %H:%M}",
        )
    elif ends < now:
        raise ConfigError(
            f"[server] console_certificate: {config.console_certificate}",
            expected=f"a certificate that counts today, {now:%Y-%m-%d %H:%M} UTC",
            got=f"one from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC",
            hint="Browsers refuse it. Put another there, see that this machine's clock is right, or do without: "
            "--console off.",
        )


def _settings(config: ServerConfig, address: str, port: int) -> ConsoleSettings:
    return ConsoleSettings(
        address=address,
        port=port,
        folder=str(config.state.resolve()),
        certificate=None if config.console_certificate is None else str(config.console_certificate.resolve()),
        key=None if config.console_key is None else str(config.console_key.resolve()),
        insecure=config.console_insecure,
        orders=config.console_orders,
        hosts=tuple(h.strip().lower() for h in config.console_hosts.split(",") if h.strip()),
        proxied=config.console_proxy,
        parent=os.getpid(),
    )


def _site(config: ServerConfig, reached: Connection, identity: IdentityFolder | None) -> dict[str, Any]:
    database = config.database or "sqlite"
    return {
        "version": __version__,
        "site": reached.site,
        "started_at": time.time(),
        "broker": without_password(reached.url),
        "database": without_password(database).partition("?")[0],
        "blobs": config.blobs,
        "insecure": identity is None,
    }
