"""Configuration of a broker: for a fleet, in which a device reaches its own topics and nothing else, or for a trial.

A fleet's has two listeners. The first asks for a certificate of the fleet's authority; its common name is the user. The
second is for joining: it asks for no certificate and lets a client reach two topics, those with the client's own id in
them.

A client's id must be unguessable on both listeners: a broker ends the connection of a client whose id another client
takes on either listener.

Nothing that a client leaves behind outlives it for long: no retained messages, no sessions without a client beyond an
hour. Otherwise anyone who reaches the listener for joining could fill the broker's memory under ever new ids.

EMQX gets the first listener alone: there a client without a certificate could say that its user is the server. Members
may ask to renew on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import IdentityError
from fedprune.security.authority import SERVER
from fedprune.security.certificates import make_request, make_tls_key, pem_of, tls_key_pem
from fedprune.wire.topics import EVERYONE, JOIN, JOINED, NO_JOB, PREFIX, SERVERS
from fedprune_server.enrollment.pki import IdentityFolder

MOSQUITTO, EMQX = "mosquitto", "emqx"
FORMS = ("2.0", "2.1")
"""Of Mosquitto's configuration: 2.1 replaced `per_listener_settings` and `acl_file`, which 3.0 will not have."""

AUTHORITY, CERTIFICATE, KEY, CRL = "authority.pem", "broker.pem", "broker.key", "crl.pem"
CONFIG, ACL, JOIN_ACL = "mosquitto.conf", "acl", "acl-join"
EMQX_CONFIG, EMQX_ACL = "emqx.conf", "acl.conf"

MAX_PACKET = 2_000_000
"""Bytes of a packet; Mosquitto 2.1's default, written down because 2.0 has none. It is one number for all listeners."""

MAX_MEMBERS = 20_000
"""Connections at a time on the listener that asks for certificates."""

MAX_WAITING, MAX_WAITING_BYTES = 1000, 64 * 2**20
"""Messages, and bytes of them, that wait for one client; Mosquitto drops what comes beyond that."""

MAX_JOINING = 100
"""Connections at a time on the listener for joining."""


@dataclass(frozen=True)
class TlsFiles:
    """A broker's files for TLS.

    Attributes:
        certificate: Its certificate, and those of its authorities (PEM).
        key: The key of that certificate (PEM).
        authority: Whose certificates of clients are right; a client needn't have one.
    """

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True)
class Broker:
    """The configuration of a broker.

    Attributes:
        hosts: Names and addresses by which boards and server reach it.
        port: Of the listener that asks for certificates.
        join_port: Of the listener for joining.
        folder: Where the files are on the broker's machine.
        form: Of Mosquitto's configuration, one of `FORMS`.
        plugin: Mosquitto's plugin for access control lists, of form 2.1.
        bind: Address to listen on; all by default.
    """

    hosts: tuple[str, ...]
    port: int
    join_port: int
    folder: Path
    form: str = "2.0"
    plugin: Path = Path("/usr/lib/mosquitto_acl_file.so")
    bind: str = ""

    def __post_init__(self) -> None:
        for path in (self.folder, self.plugin):
            if any(c.isspace() or not c.isprintable() or c in '"\\' for c in str(path)):
                raise IdentityError(
                    "path in a broker's configuration", expected="no spaces or quotes", got=repr(str(path))
                )
        if self.form not in FORMS:
            raise IdentityError("form of Mosquitto's configuration", expected=" or ".join(FORMS), got=self.form)
        if self.bind and not all(c.isalnum() or c in ".:-" for c in self.bind):
            raise IdentityError("address to listen on", expected="a name or an address", got=repr(self.bind))
        if self.port == self.join_port:
            raise IdentityError("ports of the two listeners", expected="two", got=self.port)


def write_broker(identity: IdentityFolder, kind: str, broker: Broker, out: Path) -> list[str]:
    """Write configuration, access rules, and a new certificate for the broker; returns the files' names.

    The broker's private key has mode 0600.
    """
    with storage_errors(f"can't write {out}"):
        out.mkdir(parents=True, exist_ok=True)
    key = make_tls_key()
    certificate = identity.authority.issue_broker(broker.hosts, make_request(key, "broker"))
    texts = mosquitto(identity.site, broker) if kind == MOSQUITTO else emqx(identity.site, broker)
    write_whole(out / KEY, tls_key_pem(key), private=True)
    write_whole(out / CERTIFICATE, (certificate + pem_of(identity.authority.certificate)).encode())
    write_whole(out / AUTHORITY, identity.authority.pem.encode())
    write_whole(out / CRL, identity.authority.crl_path.read_bytes())
    for name, text in texts.items():
        write_whole(out / name, text.encode())
    return [AUTHORITY, CERTIFICATE, KEY, CRL, *texts]


_LIMITS = (
    "# Without it small windows wait for delayed acknowledgements of TCP.",
    "set_tcp_nodelay true",
    f"max_packet_size {MAX_PACKET}",
    f"message_size_limit {MAX_PACKET}",
    "# What may wait for one client: a flood is dropped here and not kept.",
    f"max_queued_messages {MAX_WAITING}",
    f"max_queued_bytes {MAX_WAITING_BYTES}",
    "persistence false",
    "# How long a client leaves a session behind: the shortest time that Mosquitto knows.",
    "persistent_client_expiration 1h",
)


def mosquitto(site: str, broker: Broker) -> dict[str, str]:
    """Mosquitto's files by name: its configuration and the rules of both listeners."""
    old = broker.form == "2.0"
    acl, join_acl = broker.folder / ACL, broker.folder / JOIN_ACL
    head = [
        f"# Mosquitto {broker.form} and later, for the site {site}; written by fedprune-server broker-config.",
        *(["per_listener_settings true"] if old else []),
        *_LIMITS,
        "# A client leaves no messages behind.",
        "retain_available false",
    ]
    if not old:
        head += [
            f"plugin_load acl {broker.plugin}",
            f"plugin_opt_acl_file {acl}",
            f"plugin_load acl_join {broker.plugin}",
            f"plugin_opt_acl_file {join_acl}",
        ]
    tls = [f"certfile {broker.folder / CERTIFICATE}", f"keyfile {broker.folder / KEY}", "tls_version tlsv1.2"]

    def rules(path: Path, plugin: str, anonymous: str) -> list[str]:
        if old:
            return [f"allow_anonymous {anonymous}", f"acl_file {path}"]
        return [f"listener_allow_anonymous {anonymous}", f"plugin_use {plugin}"]

    members = [
        "# Devices and server, each with a certificate of the fleet's authority.",
        f"listener {broker.port} {broker.bind}".rstrip(),
        f"cafile {broker.folder / AUTHORITY}",
        *tls,
        f"crlfile {broker.folder / CRL}",
        "require_certificate true",
        "use_identity_as_username true",
        f"max_connections {MAX_MEMBERS}",
        *rules(acl, "acl", "false"),
    ]
    joining = [
        "# For boards that join: the broker has a certificate, the client has none yet. While no board is to join,",
        "# comment these lines out and restart the broker.",
        f"listener {broker.join_port} {broker.bind}".rstrip(),
        *tls,
        "require_certificate false",
        f"max_connections {MAX_JOINING}",
        "# Messages of quality 2 could wait half received, as long as a session does.",
        "max_qos 1",
        *rules(join_acl, "acl_join", "true"),
    ]
    return {
        CONFIG: "\n\n".join("\n".join(part) for part in (head, members, joining)) + "\n",
        ACL: "\n".join(_member_rules(site)) + "\n",
        JOIN_ACL: "\n".join(_join_rules(site)) + "\n",
    }


def trial_mosquitto(host: str, port: int, tls: TlsFiles | None) -> str:
    """Mosquitto's configuration for a trial: one listener, where every client may connect and reach every topic.

    Args:
        host: Address to listen on; empty for all.
    """
    # Started by root, Mosquitto would give up root's rights before it reads its key; for others `user` has no effect.
    # docs/run-a-fleet.md advises against root.
    lines = [*_LIMITS, "user root", "log_dest stderr", "log_type error"]
    lines += [f"listener {port} {host}".rstrip(), "allow_anonymous true", "max_qos 1"]
    if tls is not None:
        lines += [f"certfile {tls.certificate}", f"keyfile {tls.key}", "tls_version tlsv1.2"]
    return "\n".join(lines) + "\n"


def _join_rules(site: str) -> list[str]:
    place = f"{PREFIX}/{site}/%c/{NO_JOB}"
    return [f"pattern write {place}/{JOIN}", f"pattern read {place}/{JOINED}"]


def _member_rules(site: str) -> Sequence[str]:
    place = f"{PREFIX}/{site}"
    return [
        f"user {SERVER}",
        f"topic read {place}/+/+/up/#",
        f"topic write {place}/+/+/down/#",
        f"topic read {place}/+/{NO_JOB}/{JOIN}",
        f"topic write {place}/+/{NO_JOB}/{JOINED}",
        f"topic readwrite {place}/{EVERYONE}/{NO_JOB}/{SERVERS}",
        "",
        "# What a device reaches: %u is the common name of its certificate.",
        f"pattern write {place}/%u/+/up/#",
        f"pattern read {place}/%u/+/down/#",
        "# Every device reads it. Mosquitto warns at each start that there is no %u in it; a `topic` outside of a user",
        "# would count for clients without a name alone, and there are none here.",
        f"pattern read {place}/{EVERYONE}/{NO_JOB}/down",
        "",
        "# To renew its certificate: %c is the client's id, the nonce of its request.",
        *_join_rules(site),
    ]


def emqx(site: str, broker: Broker) -> dict[str, str]:
    """EMQX's (5.x) files by name: what to add to its configuration, and its rules. It has no listener for joining."""
    place, folder = f"{PREFIX}/{site}", broker.folder
    servers = f"{place}/{EVERYONE}/{NO_JOB}/{SERVERS}"
    address = broker.bind or "0.0.0.0"  # noqa: S104  # nosec B104  # what EMQX takes for all addresses
    config = f"""\
# EMQX 5, for the site {site}; written by fedprune-server broker-config. Add it to etc/emqx.conf.
# Every other listener must be off: the rules believe user names, which here come from certificates alone.
mqtt.peer_cert_as_username = cn
mqtt.max_packet_size = {MAX_PACKET}
mqtt.retain_available = false

listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.wss.default.enable = false

listeners.ssl.default {{
  bind = "{address}:{broker.port}"
  tcp_options.nodelay = true
  ssl_options {{
    cacertfile = "{folder / AUTHORITY}"
    certfile = "{folder / CERTIFICATE}"
    keyfile = "{folder / KEY}"
    versions = ["tlsv1.3", "tlsv1.2"]
    verify = verify_peer
    fail_if_no_peer_cert = true
  }}
}}

authorization {{
  no_match = deny
  deny_action = ignore
  sources = [{{ type = file, enable = true, path = "{folder / EMQX_ACL}" }}]
}}
"""
    rules = f"""\
%% Rules of the site {site}; written by fedprune-server broker-config.
{{allow, {{username, "{SERVER}"}}, subscribe, ["{place}/+/+/up/#", "{place}/+/{NO_JOB}/{JOIN}", "{servers}"]}}.
{{allow, {{username, "{SERVER}"}}, publish, ["{place}/+/+/down/#", "{place}/+/{NO_JOB}/{JOINED}", "{servers}"]}}.
{{allow, all, publish, ["{place}/${{username}}/+/up/#"]}}.
{{allow, all, subscribe, ["{place}/${{username}}/+/down/#", "{place}/{EVERYONE}/{NO_JOB}/down"]}}.
{{allow, all, publish, ["{place}/${{clientid}}/{NO_JOB}/{JOIN}"]}}.
{{allow, all, subscribe, ["{place}/${{clientid}}/{NO_JOB}/{JOINED}"]}}.
{{deny, all}}.
"""
    return {EMQX_CONFIG: config, EMQX_ACL: rules}
