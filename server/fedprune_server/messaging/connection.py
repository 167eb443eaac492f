"""A server's connection to its fleet: with an identity over TLS and signed, or, for trials on one machine, plain."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from fedprune.core.errors import ConfigError, IdentityError, search_location
from fedprune.security.tls import check_local_host
from fedprune.wire.link import BrokerLink
from fedprune.wire.queues import Event, Inbox
from fedprune.wire.topics import Topics
from fedprune.wire.urls import BrokerUrl
from fedprune_server.config.network_settings import LOOPBACK_HOSTS, BrokerSettings
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.devices.quarantine import QUARANTINE_FILE, Quarantine
from fedprune_server.enrollment.host_names import listener_names
from fedprune_server.enrollment.pki import IDENTITY_FOLDER, IdentityFolder
from fedprune_server.messaging.authentication import AuthenticatedLink
from fedprune_server.messaging.broker.embedded import EmbeddedBroker, PortTakenError
from fedprune_server.messaging.broker.programs import TlsFiles
from fedprune_server.messaging.second_server import ServerInstance, second_server_guard
from fedprune_server.messaging.transport import DroppedMessage, Item, Relay, Wire

log = logging.getLogger("fedprune.server")

# Bytes of requests to join that may wait, which are some hundreds of requests, and the seconds for which their
# connection is closed if more come.
JOIN_INBOX_BYTES, JOIN_FLOOD_PAUSE_S = 2**20, 5.0

# Ports that IANA has registered for MQTT without and with TLS.
_PLAIN_PORT, _TLS_PORT = 1883, 8883


@dataclass(frozen=True)
class ServerConnection:
    """A server's connection, not up yet.

    Attributes:
        wire: The connection for the server's loop, with signatures and rate limits in front of `link`.
        link: The connection to the broker.
        joins: A second connection for requests to join; None without an identity.
        quarantine: Decides which devices the wire hears.
    """

    wire: Wire
    link: BrokerLink
    joins: BrokerLink | None
    broker: EmbeddedBroker | None
    site: str
    quarantine: Quarantine
    url: str

    def start(self) -> None:
        """Connect, and stay connected. Raises `BrokerError` if the broker isn't there or refuses."""
        topics = Topics(self.site)
        self.link.subscribe(topics.server_subscriptions())
        self.link.start()
        if self.joins is not None:
            self.joins.subscribe([topics.join_subscription()])
            self.joins.start(patient=True)


@contextmanager
def open_connection(config: ServerConfig, identity: IdentityFolder | None) -> Iterator[ServerConnection]:
    """The connection for a configuration, with its embedded broker; both are closed at the end. The server's identity
    stays open; a server without one is for this machine only.

    Raises:
        IdentityError: The identity's files or the authorities' can't be used.
        BrokerError: The embedded broker doesn't start.
        OtherServerError: Another server of this identity has its port.
    """
    with ExitStack() as stack:
        site = config.site if identity is None else identity.site
        broker, url = None, config.broker
        if config.has_embedded_broker:
            broker = _embedded_broker(config, identity)
            try:
                stack.enter_context(broker)
            except PortTakenError:
                # The port may be another server's of this identity, such as the original beside a restored backup:
                # then the error says so.
                if identity is not None:
                    this_server = ServerInstance(config.state, only_looks=True)
                    with second_server_guard(broker.url, identity, config.ca, this_server) as guard:
                        guard.enter()
                raise
            url = broker.url
        quarantine, joins = Quarantine(path=config.state / QUARANTINE_FILE), None
        ignores = quarantine.should_ignore
        if identity is None:
            link = BrokerLink(url, f"fedprune-server-{config.site}"[:64], ignores=ignores, qos=0)
            wire: Wire = RateLimitedLink(link, quarantine)
        else:
            tls = partial(identity.tls_context, config.ca)
            link = BrokerLink(url, _random_id(), tls=tls, ignores=ignores, qos=0)
            inbox, wake = Inbox[Event](JOIN_INBOX_BYTES), link.wake
            joins = BrokerLink(url, _random_id(), tls=tls, inbox=inbox, pause_s=JOIN_FLOOD_PAUSE_S, wake=wake)
            stack.callback(joins.close)
            wire = AuthenticatedLink(
                RateLimitedLink(link, quarantine, is_signed=True), identity, joins=joins, quarantine=quarantine
            )
        stack.callback(link.close)
        yield ServerConnection(wire, link, joins, broker, site, quarantine, url)


def _random_id() -> str:
    """An MQTT client id that nobody can guess: a broker ends the connection of a client whose id another one takes."""
    return f"fedprune-{secrets.token_hex(12)}"


@contextmanager
def open_identity(config: ServerConfig, *, insecure: bool) -> Iterator[IdentityFolder | None]:
    """The server's identity, closed at the end; None with `insecure`, on this machine alone. Raises `ConfigError` if
    the server would leave this machine without TLS and identity, or the site isn't the identity's, and `IdentityError`
    if there is no identity, or it is damaged."""
    url = None if config.has_embedded_broker else BrokerUrl.parse(config.broker)
    if insecure or (url is not None and not url.tls):
        check_local_host(config.host if url is None else url.host)
    if insecure and url is not None and url.tls:
        raise ConfigError(
            "--insecure", expected="a broker at mqtt://, or the embedded one", got=url.without_credentials,
            hint="A broker at mqtts:// belongs to a fleet with an identity: leave --insecure out, or name another "
            "--broker (a state folder remembers its own).",
        )  # fmt: skip
    if insecure:
        yield None
        return
    if not (config.state / IDENTITY_FOLDER).is_dir():
        raise IdentityError(
            f"{config.state} has no identity, by which boards know their server",
            hint=f"Make one: fedprune-server init --state {config.state} --site {config.site}. "
            f"For a trial on this machine alone: --insecure.{search_location(config.state)}",
        )
    with IdentityFolder(config.state, database=config.database) as identity:
        if config.site not in (identity.site, ServerConfig.site):
            expected = f"{identity.site}, as the identity in {config.state} says"
            raise ConfigError("site", expected=expected, got=config.site)
        yield identity


def _embedded_broker(config: BrokerSettings, identity: IdentityFolder | None) -> EmbeddedBroker:
    if identity is None:
        return EmbeddedBroker(config.host, _PLAIN_PORT if config.port is None else config.port)
    hosts = listener_names(config.host)
    if config.host not in LOOPBACK_HOSTS:
        log.warning(
            "the embedded broker is for trials: whoever reaches %s may ask to join, and crowd it. See "
            "docs/run-a-fleet.md.",
            config.host,
        )
        log.info("boards reach it as one of: %s", ", ".join(hosts))
    port = _TLS_PORT if config.port is None else config.port
    identity.update_revocations()  # Mosquitto reads the list when it starts
    return EmbeddedBroker(config.host, port, TlsFiles(*identity.listener_files("broker", hosts), identity.site))


class RateLimitedLink(Relay):
    """A connection without the messages that a quarantine drops. Signatures are checked behind it, if messages are
    signed, because each check costs as much as dropping a dozen messages here; then its sender is charged behind it."""

    def __init__(self, link: Wire, quarantine: Quarantine, *, is_signed: bool = False) -> None:
        super().__init__(link)
        self._quarantine, self._is_signed = quarantine, is_signed

    def get(self, timeout: float | None = 0.0) -> Item | DroppedMessage | None:
        event = self._quarantine.next_event()
        if event is not None:
            return event
        item = self._link.get(timeout)
        if isinstance(item, tuple):
            # The topic's level that names the device. Its text is a sender's, and need not be a valid name.
            levels, is_chunk = item[0].split("/", 4), item[0].endswith("/blob")
            device = levels[3] if len(levels) > 3 else ""
            is_verified = not self._is_signed
            if not self._quarantine.charge_message(device, len(item[1]), chunk=is_chunk, is_verified=is_verified):
                return DroppedMessage()
        return item
