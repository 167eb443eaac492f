"""A server's console as its configuration wants it."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

from cryptography.x509 import load_pem_x509_certificate

from fedprune import __version__
from fedprune.core.errors import ConfigError, MissingExtraError, reason
from fedprune_server.config.config import ServerConfig, without_password
from fedprune_server.devices.board_logs import BoardLogs
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.messaging.connection import Connection
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.setup import WatchedJob
from fedprune_server.ota.store import RolloutStore
from fedprune_server.web.database import FILE, ConsoleDatabase
from fedprune_server.web.process import ConsoleProcess
from fedprune_server.web.state.admin_executor import Clerk
from fedprune_server.web.state.board_logs import BoardTold
from fedprune_server.web.state.poller import Lookout
from fedprune_server.web.state.publisher import Feed
from fedprune_server.web.state.publisher_messages import Begin
from fedprune_server.web.state.surroundings import Members, ReleaseWatch

log = logging.getLogger("fedprune.server")

_PACKAGES = ("argon2", "fastapi", "jinja2", "uvicorn")


def desks_of(server: Any) -> tuple[list[WatchedJob], Callable[[str], str | None], Callable[[str], bool] | None]:
    """The jobs of a daemon or of a host, which of them has a device, and whether a device is there."""
    desks = getattr(server, "desks", None)
    if desks is None:
        return [server], lambda device: None, None
    return list(desks.values()), server.holder, server.present


@contextmanager
def with_console(
    config: ServerConfig,
    reached: Connection,
    identity: IdentityFolder | None,
    server: Any,
    *,
    releases_given: bool,
    logs: BoardLogs | None = None,
    alerts: AlertBook | None = None,
) -> Iterator[Feed | None]:
    """A console for a server, if its configuration, which `check_console` has checked, asks for one.

    Args:
        config: The configuration.
        reached: The server's connection.
        identity: The server's; None for one without.
        server: The daemon, or the host of several jobs.
        releases_given: Whether this server gives boards releases.
        logs: What boards tell of their logs.
        alerts: The open alerts; None for none.

    Raises:
        ConfigError: The port is in use.
        StorageError: Its database can't be used.
    """
    place = config.console_place
    if place is None:
        yield None
        return
    desks, lent, here = desks_of(server)
    with ExitStack() as stack:
        check_free(*place)
        members = releases = clerk = None
        if identity is not None:
            store = IdentityStore(identity.path / "identity.db", read_only=True)
            stack.callback(store.close)
            members, clerk = Members(store, identity.behind), Clerk(config.state, config.console_releases)
            if releases_given:
                releases = ReleaseWatch(stack.enter_context(RolloutStore(config.state)))
        lookout = Lookout(members, releases, clerk)
        stack.callback(lookout.close)
        lookout.start()
        from fedprune_server.web.auth.accounts import Accounts

        with ConsoleDatabase(config.state / FILE) as database:
            empty = len(Accounts(database)) == 0
        boards = None
        if logs is not None:
            boards = BoardTold(config.state)
            logs.told = boards.hear
        child = ConsoleProcess(_begin(config, *place))
        feed = Feed(
            [d.view for d in desks], _site(config, reached, identity), child, clerk=clerk, lookout=lookout,
            boards=boards, allowed=config.console_orders, lent=lent, here=here, alerts=alerts,
        )  # fmt: skip
        stack.callback(feed.close)
        for desk in desks:
            desk.onlookers.join(feed)
        logger = logging.getLogger("fedprune")
        logger.addHandler(feed.tap)
        stack.callback(logger.removeHandler, feed.tap)
        if empty:
            log.warning(
                "nobody may use the console yet: fedprune-server operators add NAME --role admin --state %s",
                config.state,
            )
        yield feed


def check_console(config: ServerConfig) -> None:
    """Check the console's settings, if the configuration asks for one; its port may still be another server's.

    Raises:
        MissingExtraError: The packages of the extra `console` are missing.
        ConfigError: The address is not this machine's, or the certificate can't be used.
    """
    if config.console_place is not None:
        check_packages()
        check_tls(config)
        check_free(config.console_place[0], 0)


def check_packages(packages: Sequence[str] = _PACKAGES) -> None:
    """Say so where the extra `console` isn't installed.

    Raises:
        MissingExtraError: It isn't.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"the console needs {', '.join(missing)}", extra="console")


def check_free(address: str, port: int) -> None:
    """Make sure that somebody can listen there.

    Raises:
        ConfigError: Nobody can.
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
    """Make sure that the console's certificate and key can be used now.

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


def _begin(config: ServerConfig, address: str, port: int) -> Begin:
    return Begin(
        address=address,
        port=port,
        database=str((config.state / FILE).resolve()),
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
