"""As whom a board takes part, and by which broker: options of `join` and `run`, and what they lead to."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.disk import storage_errors
from fedprune.core.errors import BrokerError, ConfigError, ExitCode, IdentityError, ProtocolError, UsageError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_token import Claim
from fedprune.security.tls import SYSTEM, insecure_allowed
from fedprune.wire.broker_url import BrokerUrl, tls_context
from fedprune.wire.mqtt.link import Link
from fedprune.wire.topics import EVERYONE, check_device, check_name
from fedprune_device.enrolment.enrolment import Renewal, enrol, join_urls, one_claim, read_claim
from fedprune_device.network.connection import Channel, Connection
from fedprune_device.network.signed_channel import SignedChannel
from fedprune_device.storage.directory_owner import DirectoryOwner
from fedprune_device.storage.state_directory import DeviceStore

BROKER, JOIN, SITE, DEVICE = "FEDPRUNE_BROKER", "FEDPRUNE_JOIN", "FEDPRUNE_SITE", "FEDPRUNE_DEVICE"
IDENTITY, CLAIM = "identity", "claim"
"""Folder of a board's identity, and file of its claim, in its state folder."""

_OLD_IDENTITY = "identity.old"
"""What a board was that is about to join with a new key."""

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Membership:
    """A board's place in a fleet.

    Attributes:
        site: The fleet's site.
        device: The board's name.
        broker: The broker's URL.
        urls: Where to ask to be let in.
        authority: Who vouches for the broker; None for the fleet's own authority.
        identity: The board's; None where it does without, on its server's machine.
    """

    site: str
    device: str
    broker: str
    urls: tuple[str, ...]
    authority: Path | None
    identity: DeviceIdentity | None

    def connection(self, next_session: Callable[[], int]) -> Connection:
        """The connection to the server, not started yet.

        Args:
            next_session: Numbers each connection to the broker.

        Raises:
            IdentityError: The board hasn't joined, or a file of its identity is damaged.
            StorageError: A file of its identity can't be read.
        """
        identity = self.identity
        if identity is None:
            channel = Channel(self.device, self.site)
            name = f"fedprune-{self.site}-{self.device}"
            link = Link(self.broker, name, will=lambda: channel.will(next_session()))
        else:
            identity.context(self.authority)  # an error in it is reported better now than when the board connects
            channel = SignedChannel(identity)
            link = Link(
                self.broker,
                f"fedprune-{secrets.token_hex(12)}",
                will=lambda: channel.will(next_session()),
                tls=lambda: identity.context(self.authority),
            )
        link.subscribe(channel.topics.device_subscriptions(self.device))
        return Connection(link, channel)

    def web_context(self) -> ssl.SSLContext:
        """TLS with web servers that have blobs: whom the system trusts, the fleet's authority and `authority` vouch.

        A board shows them its certificate, if they ask for one.

        Raises:
            ConfigError: The file of authorities can't be used.
            IdentityError: The board hasn't joined, or a file of its identity is damaged.
        """
        if self.identity is None:
            return tls_context()
        context = self.identity.context()
        context.load_default_certs()
        if self.authority not in (None, SYSTEM):
            try:
                context.load_verify_locations(cafile=str(self.authority))
            except OSError as error:
                raise ConfigError(f"can't use the CA file {self.authority}: {error}") from error
        return context

    def renewal(self, link: Link) -> Renewal | None:
        """What keeps the board's certificate fresh while it is connected by `link`."""
        if self.identity is None:
            return None
        return Renewal(self.identity, self.urls, lambda: link.connected, self.authority)


def add_membership(parser: argparse.ArgumentParser) -> None:
    """Add the options that say as whom, and by which broker, and the folder of what is kept."""
    parser.add_argument(
        "--broker",
        metavar="URL",
        default=os.environ.get(BROKER),
        help=f"mqtts://[user:password@]host[:port]; ${BROKER} keeps a password out of process lists",
    )
    parser.add_argument(
        "--join",
        metavar="URL",
        default=os.environ.get(JOIN),
        help=f"where to ask to be let in, ${JOIN} (default: the broker's port for joining, 8884, then the broker)",
    )
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="who vouches for the broker; `system` for the system's authorities (default: the fleet's own)",
    )
    parser.add_argument(
        "--site",
        type=_name(check_name),
        default=os.environ.get(SITE, "default"),
        help="the fleet's site (default: $FEDPRUNE_SITE, else default)",
    )
    parser.add_argument(
        "--device",
        type=_name(check_device),
        default=os.environ.get(DEVICE) or _host_name(),
        metavar="NAME",
        help="this board's name, unique in the site (default: $FEDPRUNE_DEVICE, else the host's name)",
    )
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="what must survive a power cut")
    parser.add_argument(
        "--claim", metavar="FILE", help="a one-time claim, - for standard input (default: the file claim in --state)"
    )


def add_join_command(commands: Any) -> None:
    """Add `join`."""
    join = commands.add_parser("join", help="become a member of a fleet, with a claim or by the operator's approval")
    add_membership(join)
    join.add_argument("--pin", metavar="HEX", help="of the server's authority, as `init` shows it, without a claim")
    join.add_argument(
        "--new-key", action="store_true", help="forget the identity that this board has, such as a revoked one"
    )
    join.add_argument("--patient", action="store_true", help="wait as long as it takes")
    join.set_defaults(run=_join)


def membership(arguments: argparse.Namespace, *, insecure: bool = False) -> Membership:
    """The place in a fleet that options name.

    Args:
        arguments: What `add_membership` added.
        insecure: Do without an identity.

    Raises:
        ConfigError: No broker is named, or one that is not on this machine is to be used without TLS.
        IdentityError: The identity is damaged.
        StorageError: The disk fails or is full.
    """
    urls = checked_urls(arguments, insecure=insecure)
    identity = None
    if not insecure:
        identity = DeviceIdentity(arguments.state / IDENTITY, arguments.site, arguments.device)
    return Membership(arguments.site, arguments.device, arguments.broker, urls, arguments.ca, identity)


def checked_urls(arguments: argparse.Namespace, *, insecure: bool = False) -> tuple[str, ...]:
    """Where to ask to be let in; nothing is written yet.

    Args:
        arguments: What `add_membership` added.
        insecure: Do without an identity.

    Raises:
        ConfigError: No broker is named, or one that is not on this machine is to be used without TLS or identity;
            or the file of authorities can't be used.
    """
    if not arguments.broker:
        raise ConfigError("no broker is given", hint=f"Use --broker mqtts://host or set {BROKER}.")
    url = BrokerUrl.parse(arguments.broker)
    if insecure or not url.tls:
        insecure_allowed(url.host)
    if insecure and url.tls and arguments.ca is None:
        raise ConfigError(
            "--insecure", expected="a broker at mqtt://", got=url.bare,
            hint="A server whose broker is at mqtts:// has an identity: join it with --claim FILE, without --insecure.",
        )  # fmt: skip
    if arguments.ca is not None and (insecure or not url.tls):
        raise ConfigError("--ca", expected="a broker at mqtts://, and an identity", got=str(url))
    if arguments.ca not in (None, SYSTEM):
        tls_context(arguments.ca)
    urls = [arguments.join] if arguments.join else join_urls(arguments.broker)
    for other in map(BrokerUrl.parse, urls):
        if not other.tls:
            insecure_allowed(other.host)
    return tuple(urls)


def join_first(
    member: Membership,
    arguments: argparse.Namespace,
    *,
    pin: bytes | None = None,
    patient: bool,
    stopped: threading.Event | None = None,
) -> bool:
    """Join, if this board hasn't yet; the file of its claim is deleted then.

    Args:
        member: As whom.
        arguments: What `add_membership` added.
        pin: Of the server's authority, where there is no claim.
        patient: Wait as long as it takes.
        stopped: Ends the waiting.

    Returns:
        Whether it is a member now; it isn't only if it was stopped.

    Raises:
        IdentityError: There is neither claim nor pin.
        JoinError: The server refuses, or the claim is none.
        BrokerError: Nobody answers.
        StorageError: The disk fails or is full.
    """
    identity, kept = member.identity, arguments.state / CLAIM
    if identity is None:
        return True
    if not identity.joined:
        claim = _claim(arguments.claim, kept)
        if claim is None and pin is None:
            raise IdentityError(
                f"{member.device} is no member of site {member.site} yet",
                hint="Let it join with a claim of `fedprune-server claim` (--claim FILE), or without one: "
                "`fedprune-device join --pin HEX`, with the pin that `fedprune-server init` showed, and the operator's "
                "approval. For a trial on the server's machine: --insecure on both sides.",
            )
        stopped = stopped or threading.Event()
        patience = None if patient else _PATIENCE_S
        _tell(f"{member.device} asks to be let into site {member.site}")
        try:
            enrol(
                identity, member.urls, claim, pin,
                authority=member.authority, patience_s=patience, stopped=stopped, tell=_tell,
            )  # fmt: skip
        except BrokerError:
            if stopped.is_set():
                return False
            raise
        _tell(f"{member.device} is a member of site {member.site}, with key {identity.key.verifying.fingerprint}")
    elif arguments.claim is not None:
        _tell(
            f"{member.device} is a member already, so that --claim {arguments.claim} is ignored. If it was shut out, "
            "let it join anew: fedprune-device join --new-key --claim FILE, with the same --broker and --state"
        )
    with storage_errors(f"can't delete {kept}"):
        kept.unlink(missing_ok=True)  # it is used up, or not needed
    return True


def _join(arguments: argparse.Namespace) -> int:
    owner = DirectoryOwner(arguments.device, arguments.site)
    owner.check(arguments.state)
    checked_urls(arguments)
    pin = _pin(arguments.pin)
    with DeviceStore(arguments.state, owner=owner):  # not beside a service that runs
        folder, old = arguments.state / IDENTITY, arguments.state / _OLD_IDENTITY
        with storage_errors(f"can't replace {folder}"):
            if arguments.new_key and folder.exists() and not old.exists():  # else the last try goes on
                folder.rename(old)
        member = membership(arguments)
        if member.identity is not None and member.identity.joined:
            print(f"{member.device} is a member already, with key {member.identity.key.verifying.fingerprint}")
        else:
            try:
                join_first(member, arguments, pin=pin, patient=arguments.patient)
            except BaseException:
                if old.exists():  # what it was is better than nothing
                    shutil.rmtree(folder, ignore_errors=True)
                    old.rename(folder)
                raise
        with storage_errors(f"can't delete {old}"):
            if old.exists():
                shutil.rmtree(old)
        owner.claim(arguments.state)
    return int(ExitCode.OK)


def _claim(given: str | None, kept: Path) -> Claim | None:
    if given == "-":
        return one_claim(sys.stdin.read(), "standard input")
    if given is not None:
        return read_claim(Path(given))
    return read_claim(kept) if kept.exists() else None


def _pin(text: str | None) -> bytes | None:
    plain = re.sub(r"[\s:-]", "", text or "")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{24}", plain):
        raise UsageError("--pin", expected="24 hex digits, as `fedprune-server init` shows them", got=text[:80])
    return bytes.fromhex(plain)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _host_name() -> str:
    """This machine's name as a device's: what may not stand in one becomes a dash."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname().partition(".")[0])[:64]
    return name if name not in ("", ".", "..", EVERYONE) else "board"


def _name(check: Callable[[object, str], str]) -> Callable[[str], str]:
    def checked(text: str) -> str:
        try:
            return check(text, "name")
        except ProtocolError as error:
            raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from error

    return checked
