"""A board's membership in a fleet: the options that name broker, site and device, and the connection they lead to."""

from __future__ import annotations

import logging
import secrets
import ssl
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.errors import BrokerError, ConfigError, FedpruneError, IdentityError, StaleEpochError
from fedprune.security.device_identity import DeviceIdentity
from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import Opener, Sealer
from fedprune.security.tls import check_local_host
from fedprune.wire.link import BrokerLink, authorities_error, tls_context
from fedprune.wire.messages import Birth, Hello, Message, parse_message
from fedprune.wire.urls import SYSTEM_AUTHORITIES, BrokerUrl
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.enrollment import enrol, join_urls, read_claim_file

IDENTITY_FOLDER, CLAIM_FILE = "identity", "claim"  # in a board's state folder

_JOIN_TIMEOUT_S = 60.0  # how long a board that is not told to be patient waits for an answer


_LOG = logging.getLogger("fedprune.device")

_RENEWAL_INTERVAL_S = 600.0  # between two looks at the certificate's end
_DAY_S = 24 * 3600.0
_RENEWAL_TIMEOUT_S = 60.0  # for one renewal; the next look tries again


# The pause after a repeated birth, which doubles with each further one, and the longest pause. Without pauses, anyone
# who may publish on the board's topics could make it send births for ever.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 10.0, 3600.0


# A birth is a board's announcement of itself after it has connected, a hello the server's greeting at its start. Both
# begin a new epoch of their signer: messages of earlier epochs are refused, so that none can be replayed. A side that
# receives a message of an old epoch asks for the other's birth or hello again (`fedprune.security.signed_channel`).
class SignedChannel(MessageChannel):
    """Signs what a board that has joined sends, and accepts each message that its server has signed, once."""

    def __init__(self, identity: DeviceIdentity, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(identity.device, identity.site)
        self._identity = identity
        self._sealer = Sealer(identity.key, identity.epochs)
        self._opener = Opener(identity.server, identity.server_epochs(), identity.store_server_epoch)
        self._clock = clock
        self._has_sent_birth = self._needs_birth = False
        self._next_birth_at, self._pause_s = 0.0, _FIRST_PAUSE_S

    @cached_property
    def signing_key(self) -> SigningKey:
        return self._identity.key

    @property
    def is_birth_due(self) -> bool:
        """Whether to send a birth again: a server's message was of an old epoch, so one of both has restarted."""
        return self._has_sent_birth and self._needs_birth

    def seal(self, topic: str, message: Message) -> bytes:
        """A signed payload; a birth begins a new epoch. Raises `StorageError` if that can't be written."""
        if isinstance(message, Birth):
            self._needs_birth = False
            # The server may have restarted: only an epoch that is new to it is sure to count.
            self._sealer.begin_epoch(topic)
            self._has_sent_birth = True
        return self._sealer.seal(topic, message.to_bytes())

    def open(self, topic: str, payload: bytes) -> Message:
        """The message in a payload that the server signed, the first time it arrives; otherwise `ProtocolError`."""
        try:
            body = self._opener.open(topic, payload)
        except StaleEpochError:
            self._note_stale_epoch()
            raise
        message = parse_message(body)
        if isinstance(message, Hello):
            self._on_hello(topic, message)
        return message

    def _on_hello(self, topic: str, hello: Hello) -> None:
        if topic == self.topics.down(self.device):
            # With a hello to this board only, the server asks for a new epoch. A block of epochs is skipped: a copy of
            # this board's disk may have used them, and the server rejects what is not later.
            self._sealer.skip_block()
        if (seconds := hello.time) is not None:
            try:
                self._identity.trusted_time.note_time(seconds)
            except FedpruneError as error:  # the server repeats it
                _LOG.warning("%s", error)

    def _note_stale_epoch(self) -> None:
        """Note, at most once per pause, that the server may not know of this board's restart, or of its own."""
        now = self._clock()
        if not self._has_sent_birth or now < self._next_birth_at:
            return
        if now >= self._next_birth_at + _MAX_PAUSE_S:  # after a long quiet time the pauses start short again
            self._pause_s = _FIRST_PAUSE_S
        self._next_birth_at, self._pause_s = now + self._pause_s, min(_MAX_PAUSE_S, 2 * self._pause_s)
        self._needs_birth = True


@dataclass(frozen=True)
class MembershipOptions:
    """The options of `cli.options.add_membership`; with `insecure` the board does without an identity."""

    broker: str | None
    join: str | None
    ca: Path | None
    site: str
    device: str
    state: Path
    claim: str | None
    insecure: bool = False


@dataclass(frozen=True)
class Membership:
    """A board's membership in a fleet. `urls` are where it asks to join; `identity` is None for a board on its server's
    machine that works without one."""

    options: MembershipOptions
    urls: tuple[str, ...]
    identity: DeviceIdentity | None

    def connect(self, next_session: Callable[[], int]) -> BoardConnection:
        identity, broker, authority = self.identity, self.options.broker or "", self.options.ca
        site, device = self.options.site, self.options.device
        if identity is None:
            channel = MessageChannel(device, site)
            link = BrokerLink(broker, f"fedprune-{site}-{device}", will=lambda: channel.will(next_session()))
        else:
            identity.tls_context(authority)  # an error in it is reported better now than when the board connects
            channel = SignedChannel(identity)
            link = BrokerLink(
                broker,
                f"fedprune-{secrets.token_hex(12)}",
                will=lambda: channel.will(next_session()),
                tls=lambda: identity.tls_context(authority),
            )
        link.subscribe(channel.topics.device_subscriptions(device))
        return BoardConnection(link, channel)

    def web_context(self) -> ssl.SSLContext:
        """TLS with web servers that have blobs, by the system's authorities, the fleet's authority and that of `--ca`.

        A board presents its certificate if they request one.
        """
        if self.identity is None:
            return tls_context()
        context = self.identity.tls_context()
        context.foreign_message = ""  # these are no brokers
        context.load_default_certs()
        if self.options.ca not in (None, SYSTEM_AUTHORITIES):
            try:
                context.load_verify_locations(cafile=str(self.options.ca))
            except OSError as error:
                raise authorities_error(self.options.ca, error) from error
        return context

    def renewal_task(self, link: BrokerLink) -> Renewal | None:
        """The task that renews the board's certificate while `link` is connected, or closed for a time on purpose."""
        if self.identity is None:
            return None
        return Renewal(self.identity, self.urls, lambda: link.connected or link.is_away, self.options.ca)


def resolve_membership(options: MembershipOptions) -> Membership:
    """The place in a fleet that the options name; raises as `checked_urls`."""
    urls = checked_urls(options)
    folder = options.state / IDENTITY_FOLDER
    identity = None if options.insecure else DeviceIdentity(folder, options.site, options.device)
    return Membership(options, urls, identity)


def checked_urls(options: MembershipOptions) -> tuple[str, ...]:
    """The URLs at which to ask to join; nothing is written yet. Raises `ConfigError` if no broker is named, a remote
    one is to be used without TLS or identity, or the file of authorities is invalid."""
    insecure = options.insecure
    if not options.broker:
        raise ConfigError("no broker is given", hint="Use --broker mqtts://host or set FEDPRUNE_BROKER.")
    url = BrokerUrl.parse(options.broker)
    if insecure or not url.tls:
        check_local_host(url.host)
    if insecure and url.tls and options.ca is None:
        raise ConfigError(
            "--insecure", expected="a broker at mqtt://", got=url.without_credentials,
            hint="A server whose broker is at mqtts:// has an identity: join it with --claim FILE, without --insecure.",
        )  # fmt: skip
    if options.ca is not None and (insecure or not url.tls):
        raise ConfigError("--ca", expected="a broker at mqtts://, and an identity", got=str(url))
    if options.ca not in (None, SYSTEM_AUTHORITIES):
        tls_context(options.ca)
    urls = [options.join] if options.join else join_urls(options.broker)
    for join_url in map(BrokerUrl.parse, urls):
        if not join_url.tls:
            check_local_host(join_url.host)
    return tuple(urls)


def join_first(
    member: Membership, *, pin: bytes | None = None, patient: bool, stopped: threading.Event | None = None
) -> bool:
    """Join, if this board hasn't yet, and delete the file of its claim; False only if it was stopped.

    `pin` is that of the server's authority, where there is no claim. Raises as `enrol` does.
    """
    identity, options, stored_claim = member.identity, member.options, member.options.state / CLAIM_FILE
    if identity is None:
        return True
    if not identity.has_joined:
        claim = _load_claim(options.claim, stored_claim, options.device)
        if claim is None and pin is None:
            identity.check_complete()
            raise IdentityError(
                f"{options.device} isn't a member of site {options.site} yet",
                hint="Let it join with a claim of `fedprune-server claim` (--claim FILE), or without one: "
                "`fedprune-device join --pin HEX`, with the pin that `fedprune-server init` showed, and the operator's "
                "approval. For a trial on the server's machine: --insecure on both sides.",
            )
        stopped = stopped or threading.Event()
        patience = None if patient else _JOIN_TIMEOUT_S
        _print_to_stderr(f"{options.device} asks to join site {options.site}")
        try:
            enrol(
                identity, member.urls, claim, pin,
                authority=options.ca, patience_s=patience, stopped=stopped, report=_print_to_stderr,
            )  # fmt: skip
        except BrokerError:
            if stopped.is_set():
                return False
            raise
        fingerprint = identity.key.verifying_key.fingerprint
        _print_to_stderr(f"{options.device} is a member of site {options.site}, with key {fingerprint}")
    elif options.claim is not None:
        _print_to_stderr(
            f"{options.device} is a member already, so that --claim {options.claim} is ignored. Only if "
            f"`fedprune-server devices list {options.device}` shows it as revoked, let it join again: fedprune-device "
            "join --new-key --claim FILE, with the same --broker and --state"
        )
    with storage_errors(f"can't delete {stored_claim}"):
        stored_claim.unlink(missing_ok=True)  # it is used up, or not needed
    return True


def _load_claim(option: str | None, stored_claim: Path, device: str) -> JoinClaim | None:
    if option == "-":
        return JoinClaim.parse(sys.stdin.read().lstrip("\ufeff"), "standard input", device)
    path = stored_claim if option is None else Path(option)
    return None if option is None and not path.exists() else read_claim_file(path, device)


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Renewal:
    """Requests a new certificate in time, in a thread; the board presents it from its next connection on.

    It is also requested at most once a day while the broker refuses the board, because the clock of a board that was
    switched off may be wrong.
    """

    def __init__(
        self,
        identity: DeviceIdentity,
        urls: Sequence[str],
        is_connected: Callable[[], bool],
        authority: Path | None = None,
    ) -> None:
        self._identity, self._urls, self._is_connected, self._authority = identity, urls, is_connected, authority
        self._renewed_at = -_DAY_S
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped.wait(_RENEWAL_INTERVAL_S):
            try:
                if self.is_due():
                    self.renew()
            except Exception as error:  # noqa: BLE001, PERF203 - nothing may end what keeps the board a member
                _LOG.warning("no new certificate yet: %s", error)

    def is_due(self) -> bool:
        if self._is_connected():
            return self._identity.needs_renewal()
        return time.monotonic() - self._renewed_at >= _DAY_S

    def renew(self, patience_s: float = _RENEWAL_TIMEOUT_S) -> None:
        """Request a new certificate; if none comes, an error is raised and the old one stays."""
        enrol(
            self._identity, self._urls, None, self._identity.pin, authority=self._authority,
            patience_s=patience_s, stopped=self._stopped, report=_LOG.debug,
        )  # fmt: skip
        self._renewed_at = time.monotonic()
        _LOG.info("a new certificate: it counts from the next connection on")
