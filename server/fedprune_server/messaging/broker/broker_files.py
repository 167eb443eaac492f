"""Configuration of a fleet's broker, from the templates beside this file: a device reaches only its own topics.

Mosquitto gets two listeners. The first asks for a certificate of the fleet's authority; its common name is the user.
The second is for joining: it asks for no certificate and lets a client reach two topics, those with the client's own id
in them.

A client's id must be unguessable on both listeners: a broker ends the connection of a client whose id another client
takes on either listener.

Nothing that a client leaves behind outlives it for long: no retained messages, no sessions without a client beyond an
hour. Otherwise anyone who reaches the listener for joining could fill the broker's memory under ever new ids.

EMQX gets the first listener alone, with the same rules in its own form: there a client without a certificate could say
that its user is the server. Members may ask to renew on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import IdentityError
from fedprune.security.certificates import make_request, make_tls_key, pem_of, tls_key_pem
from fedprune_server.enrollment.pki import IdentityFolder

# Who may publish and subscribe what, in Mosquitto's form: with a certificate, and without.
RULES_FILES = ("acl", "acl-join")
EMQX_RULES_FILE = "acl.conf"
TEMPLATES = {"mosquitto": ("mosquitto.conf", *RULES_FILES), "emqx": ("emqx.conf", EMQX_RULES_FILE)}
BROKER_KEY_FILE = "broker.key"


@dataclass(frozen=True)
class BrokerAddress:
    """A fleet's broker.

    Attributes:
        hosts: Names and addresses by which boards and server reach it.
        port: Port of the listener that asks for certificates.
        join_port: Port of the listener for joining.
        folder: Folder of the files on the broker's machine.
        bind: Address to listen on; all by default.
    """

    hosts: tuple[str, ...]
    port: int
    join_port: int
    folder: Path
    bind: str = ""

    def check(self) -> None:
        """Raise `IdentityError` for what would say something else in a configuration file."""
        folder = str(self.folder)
        # Both texts are pasted into configuration files, whose quoting differs from broker to broker.
        if any(c.isspace() or not c.isprintable() or c in '"\\' for c in folder):
            raise IdentityError("path in a broker's configuration", expected="no spaces or quotes", got=repr(folder))
        if self.bind and not all(c.isalnum() or c in ".:-" for c in self.bind):
            raise IdentityError("address to listen on", expected="a name or an address", got=repr(self.bind))
        if self.port == self.join_port:
            raise IdentityError("ports of the two listeners", expected="two", got=self.port)


def write_broker(identity: IdentityFolder, kind: str, broker: BrokerAddress, out: Path) -> list[str]:
    """Write configuration, access rules, and a new certificate for the broker; returns the files' names.

    The broker's private key has mode 0600.
    """
    broker.check()
    with storage_errors(f"can't read {identity.authority.crl_path}"):
        revocation_list = read_file(identity.authority.crl_path, own=True)
    with storage_errors(f"can't write {out}"):
        out.mkdir(parents=True, exist_ok=True)
    key = make_tls_key()
    certificate = identity.authority.issue_broker(broker.hosts, make_request(key, "broker"))
    contents = {
        "authority.pem": identity.authority.pem.encode(),
        "broker.pem": (certificate + pem_of(identity.authority.certificate)).encode(),
        "crl.pem": revocation_list,
        **{name: filled_template(name, identity.site, broker).encode() for name in TEMPLATES[kind]},
    }
    write_atomically(out / BROKER_KEY_FILE, tls_key_pem(key), private=True)
    for name, content in contents.items():
        write_atomically(out / name, content)
    return [BROKER_KEY_FILE, *contents]


def filled_template(name: str, site: str, broker: BrokerAddress) -> str:
    """One of `TEMPLATES`, filled in."""
    if name == EMQX_RULES_FILE:
        return _emqx_rules(filled_template("acl", site, broker))
    template = (files(__package__) / "templates" / name).read_text(encoding="ascii")
    return Template(template).substitute(
        site=site,
        folder=broker.folder,
        members=f"{broker.port} {broker.bind}".rstrip(),
        joining=f"{broker.join_port} {broker.bind}".rstrip(),
        address=f"{broker.bind or '0.0.0.0'}:{broker.port}",  # noqa: S104  # nosec B104  # as EMQX writes all addresses
    )


def _emqx_rules(acl: str) -> str:
    """Rules in Mosquitto's form as EMQX's, of which the first that fits decides."""
    rules, client = ["%% Written by fedprune-server broker-config."], "all"
    for kind, access, name in re.findall(r"^(user|topic|pattern) (?:(\w+) )?(\S+)$", acl, re.MULTILINE):
        client = {"user": f'{{username, "{name}"}}', "pattern": "all"}.get(kind, client)
        topic = name.replace("%u", "${username}").replace("%c", "${clientid}")
        actions = [action for word, action in (("read", "subscribe"), ("write", "publish")) if word in access]
        rules += [f'{{allow, {client}, {action}, ["{topic}"]}}.' for action in actions]
    return "\n".join([*rules, "{deny, all}.\n"])
