"""A device's identity on its disk, from its first request to every connection after.

    signing.key       its Ed25519 key, made here, never sent
    epoch             its latest epoch
    request.json      the pending request; the same after every restart
    tls.key.new       the TLS key of that request
    tls.key           the key of its certificate
    device.pem        its certificate
    authority.pem     the authorities that it trusts, the oldest first: one, or two while one replaces the other
    server.pub        the server's verifying key, as hex
    admitted          the server's time when the certificate was issued
    time              its time floor
    heard             the latest epochs of its server, by stream

Files are replaced in an order in which a power cut leaves either the old certificate and key or the new ones.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import make_private_folder, storage_errors, sync_folder
from fedprune.core.errors import IdentityError, JoinError, ProtocolError, StorageError, remedy
from fedprune.security.certificates import (
    issued_by,
    key_digest,
    load_authorities,
    load_certificate,
    load_tls_key,
    make_request,
    make_tls_key,
    pem_of,
    pin_of,
    request_key,
    save_tls_key,
    seconds_of,
)
from fedprune.security.joining import Admission, Claim, check_answer
from fedprune.security.joining import make_request as make_join_request
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.security.private_file import write_public
from fedprune.security.signed_channel import MAX_NUMBER, EpochFile
from fedprune.security.succession import SUCCESSIONS, Succession
from fedprune.security.tls import PinnedContext, TrustedTime, pinned_context
from fedprune.wire.fleet_messages import JoinAnswer, JoinRequest
from fedprune.wire.messages import parse

_SIGNING, _EPOCH, _REQUEST, _NEW_KEY = "signing.key", "epoch", "request.json", "tls.key.new"
_KEY, _CERTIFICATE, _AUTHORITY, _SERVER = "tls.key", "device.pem", "authority.pem", "server.pub"
_ADMITTED, _TIME, _HEARD = "admitted", "time", "heard"

RENEW_AT = 2 / 3
"""Share of a certificate's lifetime after which it is renewed."""

_FOREIGN_BROKER = (
    "its certificate is another server's: another server answers at this address, or `fedprune-server init` was run "
    "again. Connect to this fleet's server, or join the other one: docs/runbook.md#another-server-answers. "
    "A broker with a certificate of another authority, such as a hosted one, needs --ca"
)
"""A board's own authority vouches for the broker that the fleet's server runs or configures, and for no other."""


class DeviceIdentity:
    """A device's keys, certificate and knowledge of its server.

    Raises `IdentityError` if a file is damaged or open to other users.

    Attributes:
        renew_now: Set when the server has named another authority than the certificate's; cleared by the renewal.
        renewed: Set by a new certificate; cleared once the server knows.
    """

    def __init__(self, folder: Path, site: str, device: str, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.site, self.device = site, device
        with storage_errors(f"can't use {folder}"):
            make_private_folder(folder)
        path = folder / _SIGNING
        if not path.exists():
            SigningKey.make().save(path)
        self.key = SigningKey.load(path)
        self.epochs = EpochFile(folder / _EPOCH, clock)
        self._finish()
        self._time: TrustedTime | None = None
        self._issuer: str | None = None
        self.renew_now, self.renewed = threading.Event(), threading.Event()
        self._admitting = threading.Lock()  # a thread renews the certificate while the loop follows authorities

    @property
    def joined(self) -> bool:
        """Whether it has a certificate and knows its server."""
        return all((self.folder / name).exists() for name in (_CERTIFICATE, _KEY, _AUTHORITY, _SERVER))

    @property
    def server(self) -> VerifyingKey:
        """The server's verifying key. Raises `IdentityError` if the device hasn't joined, or the file is damaged."""
        try:
            return VerifyingKey.from_hex((self.folder / _SERVER).read_text().strip(), "the server's key")
        except (OSError, UnicodeDecodeError, ProtocolError) as error:
            raise IdentityError(f"{self.device} doesn't know its server's key", hint="Let it join again.") from error

    def keep_successions(self, successions: Sequence[str]) -> None:
        """Store the successions of the server's key for the launcher, as `Succession.hex`, unless they are stored."""
        text, path = "\n".join([self.site, *successions]).encode(), self.folder / SUCCESSIONS
        with storage_errors(f"can't read {path}"):
            known = path.read_bytes() if path.exists() else b""
        if known != text:
            write_public(path, text)

    def succeed(self, key: VerifyingKey, successions: Sequence[Succession]) -> None:
        """Replace the server's key by its successor, and store all successions for the launcher, which follows them
        from the key that it was installed with."""
        self._forget()  # an answer that is still to come names the old key
        self.keep_successions([s.hex for s in successions])
        write_public(self.folder / _SERVER, key.hex.encode())

    def request(self, claim: Claim | None = None) -> JoinRequest:
        """A request to join, or, once joined, for a new certificate; the same until it is answered. A claim replaces a
        request that waits for the operator."""
        pending = self._pending()
        if pending is not None and (claim is None or pending.claim == claim.id.hex()):
            return pending
        tls_key = make_tls_key()
        request = make_join_request(self.site, self.device, self.key, make_request(tls_key, self.device), claim)
        save_tls_key(tls_key, self.folder / _NEW_KEY)
        write_whole(self.folder / _REQUEST, request.to_bytes())
        return request

    def admit(self, answer: JoinAnswer, pin: bytes) -> Admission | None:
        """Accept an answer to the pending request, after which the device has `joined`.

        Args:
            pin: The authority's pin, of the claim or configured. A joined device also accepts those that it knows.

        Returns:
            The admission; None if the device must wait for the operator and repeat the request.

        Raises:
            SignatureError: The answer is not to the pending request, or not by the authority.
            JoinError: The device is refused; the next request is a new one.
        """
        pending = self._pending()
        if pending is None:
            raise IdentityError(f"{self.device} has no pending request")
        try:
            admission = check_answer(answer, pending, pin, *(self.pins if self.joined else ()))
        except JoinError:
            self._forget()
            raise
        if admission is None:
            return None
        with self._admitting:
            write_public(self.folder / _AUTHORITY, admission.authority.encode())
            if self.joined and self.server.hex != admission.server.hex:
                with storage_errors(f"can't write {self.folder}"):
                    (self.folder / _HEARD).unlink(missing_ok=True)  # another sender's
            write_public(self.folder / _SERVER, admission.server.hex.encode())
            write_whole(self.folder / _ADMITTED, str(admission.time).encode())
            write_public(self.folder / _CERTIFICATE, admission.certificate.encode())
            self._finish()
        self.renewed.set()
        self.times.learn(admission.time)
        return admission

    @property
    def times(self) -> TrustedTime:
        """Its time floor. Raises `IdentityError` if it hasn't joined yet."""
        if self._time is None:
            self._time = TrustedTime(self.folder / _TIME, self._ends)
        return self._time

    def _ends(self) -> int:
        """When its certificate ends, in seconds since 1970."""
        certificate = load_certificate(self.folder / _CERTIFICATE, "the device's certificate")
        return seconds_of(certificate.not_valid_after_utc)

    @property
    def pins(self) -> tuple[bytes, ...]:
        """Pins of the trusted authorities, the oldest first. Raises `IdentityError` if the device has none yet."""
        return tuple(map(pin_of, load_authorities(self.folder / _AUTHORITY)))

    def follow_authorities(self, pins: Sequence[str]) -> None:
        """Drop authorities older than those that the server names, and have a certificate of another one renewed.

        A new authority comes with the answer to that renewal, signed by a known one. An authority newer than those
        named stays trusted: a server with an old copy of its identity doesn't know it. The last of `pins` (hex) issues
        certificates.
        """
        with self._admitting:
            known = load_authorities(self.folder / _AUTHORITY)
            older = next((i for i, authority in enumerate(known) if pin_of(authority).hex() in pins), 0)
            if older:
                write_public(self.folder / _AUTHORITY, "".join(map(pem_of, known[older:])).encode())
        self._issuer = pins[-1] if pins else None
        if self._is_replaced():
            self.renew_now.set()

    def _is_replaced(self) -> bool:
        """Whether another authority than the one that the server named has issued the certificate."""
        return self._issuer is not None and self.authorities()[-1:] != (self._issuer,)

    def authorities(self) -> tuple[str, ...]:
        """Pins, as hex, of the trusted authorities up to the one that issued the certificate; empty without one."""
        try:
            certificate = load_certificate(self.folder / _CERTIFICATE, "the device's certificate")
            trusted = load_authorities(self.folder / _AUTHORITY)
        except IdentityError:
            return ()
        last = next((i for i, authority in enumerate(trusted) if issued_by(certificate, authority)), -1)
        return tuple(pin_of(authority).hex() for authority in trusted[: last + 1])

    def heard(self) -> dict[str, int]:
        """The latest epoch of its server by stream (`fedprune.security.signed_channel`), as `hear` wrote it. Raises
        `StorageError` if it can't be read or is damaged."""
        path = self.folder / _HEARD
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or not all(type(n) is int and 0 <= n <= MAX_NUMBER for n in body.values()):
            raise StorageError(
                f"{path} is damaged",
                hint="Without it earlier messages of the server could be replayed. To accept that, delete it.",
            )
        return body

    def hear(self, stream: str, epoch: int) -> None:
        """Store that an epoch of the server's has begun."""
        write_whole(self.folder / _HEARD, json.dumps(self.heard() | {stream: epoch}, sort_keys=True).encode())

    def renewal_due(self) -> bool:
        """Whether to renew the certificate: by the time floor, or because its authority is being replaced."""
        if self._is_replaced():
            return True
        certificate = load_certificate(self.folder / _CERTIFICATE, "the device's certificate")
        try:
            begun = int((self.folder / _ADMITTED).read_text())
        except (OSError, ValueError):
            return True
        return self.times.floor >= begun + RENEW_AT * (seconds_of(certificate.not_valid_after_utc) - begun)

    def context(self, authority: Path | None = None, *, certificate: bool = True) -> PinnedContext:
        """A TLS context for connections to a broker of `authority`, by default the fleet's.

        Without the certificate only a renewal is possible. Raises `IdentityError` if the device hasn't joined, or a
        file is damaged.
        """
        own, key = (self.folder / _CERTIFICATE, self.folder / _KEY) if certificate else (None, None)
        context = pinned_context(authority or self.folder / _AUTHORITY, own, key, lambda: self.times.floor)
        context.foreign = "" if authority else _FOREIGN_BROKER
        return context

    def _pending(self) -> JoinRequest | None:
        try:
            request = parse((self.folder / _REQUEST).read_bytes())
            key = load_tls_key(self.folder / _NEW_KEY)
            own = isinstance(request, JoinRequest) and key.public_key() == request_key(request.csr)
        except (OSError, ProtocolError, IdentityError):
            return None  # none, or a power cut between key and request: it was not sent
        if not isinstance(request, JoinRequest) or not own or request.key != self.key.verifying.hex:
            return None
        return request if (request.site, request.device) == (self.site, self.device) else None

    def _forget(self) -> None:
        with storage_errors(f"can't write {self.folder}"):
            for name in (_REQUEST, _NEW_KEY):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)

    def _finish(self) -> None:
        """Put the new TLS key in its place if the certificate is its own: also after a power cut right before."""
        new = self.folder / _NEW_KEY
        if not new.exists() or not (self.folder / _CERTIFICATE).exists():
            return
        certificate = load_certificate(self.folder / _CERTIFICATE, "the device's certificate")
        try:
            fits = key_digest(load_tls_key(new).public_key()) == key_digest(certificate.public_key())
        except IdentityError:
            return
        if fits:
            with storage_errors(f"can't write {self.folder}"):
                new.replace(self.folder / _KEY)
                (self.folder / _REQUEST).unlink(missing_ok=True)
                sync_folder(self.folder)
