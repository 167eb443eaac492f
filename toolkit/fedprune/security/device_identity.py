"""A device's identity on its disk, from its first request to every connection after.

    signing.key       its Ed25519 key, made here, never sent
    epoch             its latest epoch
    request.json      the pending request; the same after every restart
    tls.key.new       the TLS key of that request
    tls.key           the key of its certificate
    device.pem        its certificate
    authority.pem     the fleet's authority
    server.pub        the server's verifying key, as hex
    admitted          the server's time when the certificate was issued
    time              its time floor
    heard             the latest epochs of its server, by stream

Files are replaced in an order in which a power cut leaves either the old certificate and key or the new ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import flush_folder, make_private_folder, storage_errors
from fedprune.core.errors import IdentityError, JoinError, ProtocolError, SignatureError, StorageError, path_remedy
from fedprune.core.text import one_line
from fedprune.security.certificates import (
    certificate_uri,
    device_uri,
    key_digest,
    load_certificate,
    load_tls_key,
    make_request,
    make_tls_key,
    pin_of,
    request_key,
    save_tls_key,
    seconds_of,
)
from fedprune.security.epoch_file import EpochFile
from fedprune.security.join_claim import JoinClaim
from fedprune.security.joining import Admission, check_answer, make_join_request
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.security.private_file import write_public
from fedprune.security.signed_envelope import MAX_EPOCH
from fedprune.security.tls import PinnedContext, pinned_context
from fedprune.security.trusted_time import TrustedTime
from fedprune.wire.fleet_messages import JoinAnswer, JoinRequest
from fedprune.wire.messages import parse_message

_SIGNING_KEY_FILE, _EPOCH_FILE, _REQUEST_FILE = "signing.key", "epoch", "request.json"
_NEW_TLS_KEY_FILE, _TLS_KEY_FILE, _CERTIFICATE_FILE = "tls.key.new", "tls.key", "device.pem"
_AUTHORITY_FILE, _SERVER_KEY_FILE = "authority.pem", "server.pub"
_ADMISSION_TIME_FILE, _TIME_FLOOR_FILE, _SERVER_EPOCHS_FILE = "admitted", "time", "heard"
# What a board has once it is a member. `admit` completes them in an order in which it never has the certificate alone.
_MEMBER_FILES = (_CERTIFICATE_FILE, _TLS_KEY_FILE, _AUTHORITY_FILE, _SERVER_KEY_FILE)

_RESTORE_HINT = (
    "Restore all files of this folder from one backup, or let the board join again: fedprune-device join --new-key "
    "--claim FILE, after `fedprune-server devices replace` of its old keys."
)

# Share of a certificate's lifetime after which it is renewed: as with ACME clients, the last third is for failed
# attempts.
RENEWAL_SHARE = 2 / 3

# A board's own authority vouches for the broker that the fleet's server runs or configures, and for no other.
_FOREIGN_BROKER_MESSAGE = (
    "its certificate is another server's: another server answers at this address, or `fedprune-server init` was run "
    "again. Connect to this fleet's server, or join the other one: docs/runbook.md#another-server-answers. "
    "A broker with a certificate of another authority, such as a hosted one, needs --ca"
)


class DeviceIdentity:
    """A device's keys and certificate, and what it knows of its server.

    Raises `IdentityError` if a file is damaged or open to other users, if the signing key of a member is missing, or if
    the files are another device's.
    """

    def __init__(self, folder: Path, site: str, device: str, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.site, self.device = site, device
        with storage_errors(f"can't use {folder}"):
            make_private_folder(folder)
        path = folder / _SIGNING_KEY_FILE
        if not path.exists():
            # With a new key the certificate would still open connections, and the server would drop every message.
            if any((folder / name).exists() for name in _MEMBER_FILES):
                raise IdentityError(
                    f"{folder} has a member's files, but not its {_SIGNING_KEY_FILE}", hint=_RESTORE_HINT
                )
            SigningKey.make().save(path)
        self.key = SigningKey.load(path)
        self.epochs = EpochFile(folder / _EPOCH_FILE, clock)
        self._adopt_new_tls_key()
        self._check_certificate_name()
        self._trusted_time: TrustedTime | None = None

    @property
    def has_joined(self) -> bool:
        """Whether it has a certificate and knows its server."""
        return all((self.folder / name).exists() for name in _MEMBER_FILES)

    def check_complete(self) -> None:
        """Raise `IdentityError` if a member's files are here in part, as after a restore that left some out."""
        missing = [name for name in _MEMBER_FILES if not (self.folder / name).exists()]
        # A power cut before the first certificate leaves the authority and the server's key alone.
        if missing and not {_CERTIFICATE_FILE, _TLS_KEY_FILE} <= set(missing):
            raise IdentityError(f"{self.folder} has no {', '.join(missing)}", hint=_RESTORE_HINT)

    @property
    def server(self) -> VerifyingKey:
        """The server's verifying key. Raises `IdentityError` if the device hasn't joined, or the file is damaged."""
        try:
            return VerifyingKey.from_hex((self.folder / _SERVER_KEY_FILE).read_text().strip(), "the server's key")
        except (OSError, UnicodeDecodeError, ProtocolError) as error:
            raise IdentityError(f"{self.device} doesn't know its server's key", hint="Let it join again.") from error

    def request(self, claim: JoinClaim | None = None) -> JoinRequest:
        """A request to join or, once joined, for a new certificate. It stays the same until it is answered; a claim
        replaces a request that waits for the operator."""
        pending = self._pending_request()
        if pending is not None and (claim is None or pending.claim == claim.id.hex()):
            return pending
        tls_key = make_tls_key()
        request = make_join_request(self.site, self.device, self.key, make_request(tls_key, self.device), claim)
        # The key before the request: a request without its key could never be used once it is answered.
        save_tls_key(tls_key, self.folder / _NEW_TLS_KEY_FILE)
        write_atomically(self.folder / _REQUEST_FILE, request.to_bytes())
        return request

    def admit(self, answer: JoinAnswer, pin: bytes) -> Admission | None:
        """Accept an answer to the pending request, after which the device has `has_joined`.

        `pin` is the authority's: of the claim, configured, or that of a joined device. Returns the admission; None if
        the device must wait for the operator and repeat the request. Raises `SignatureError` if the answer is not to
        the pending request, not by the authority, or names another server, and `JoinError` if the device is refused;
        the next request is then a new one.
        """
        pending = self._pending_request()
        if pending is None:
            raise IdentityError(f"{self.device} has no pending request")
        try:
            admission = check_answer(answer, pending, pin)
        except JoinError:
            with storage_errors(f"can't write {self.folder}"):
                for name in (_REQUEST_FILE, _NEW_TLS_KEY_FILE):
                    (self.folder / name).unlink(missing_ok=True)
                flush_folder(self.folder)
            raise
        if admission is None:
            return None
        if self.has_joined and self.server != admission.server:  # a server has one key, so that this isn't this server
            raise SignatureError(
                "the answer names another key than this board's server has",
                expected=self.server.fingerprint,
                got=admission.server.fingerprint,
                hint="If its identity was replaced, let the board join again: fedprune-device join --new-key.",
            )
        # The certificate is written last: from then on the device has joined, and needs the other files.
        write_public(self.folder / _AUTHORITY_FILE, admission.authority.encode())
        write_public(self.folder / _SERVER_KEY_FILE, admission.server.hex.encode())
        write_atomically(self.folder / _ADMISSION_TIME_FILE, str(admission.time).encode())
        write_public(self.folder / _CERTIFICATE_FILE, admission.certificate.encode())
        self._adopt_new_tls_key()
        self.trusted_time.note_time(admission.time)
        return admission

    @property
    def trusted_time(self) -> TrustedTime:
        """Its time floor. Raises `IdentityError` if it hasn't joined yet."""
        if self._trusted_time is None:
            self._trusted_time = TrustedTime(self.folder / _TIME_FLOOR_FILE, self._certificate_end)
        return self._trusted_time

    def _certificate_end(self) -> int:
        """The end of its certificate, in seconds since 1970."""
        certificate = load_certificate(self.folder / _CERTIFICATE_FILE, "the device's certificate")
        return seconds_of(certificate.not_valid_after_utc)

    @property
    def pin(self) -> bytes:
        """The authority's pin. Raises `IdentityError` if the device has none yet."""
        return pin_of(load_certificate(self.folder / _AUTHORITY_FILE, "the authority's certificate"))

    def server_epochs(self) -> dict[str, int]:
        """The latest epoch of its server by stream (`fedprune.security.signed_channel`), as stored on the disk. Raises
        `StorageError` if it can't be read or is damaged."""
        path = self.folder / _SERVER_EPOCHS_FILE
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or not all(type(n) is int and 0 <= n <= MAX_EPOCH for n in body.values()):
            raise StorageError(
                f"{path} is damaged",
                hint="Without it earlier messages of the server could be replayed. To accept that, delete it.",
            )
        return body

    def store_server_epoch(self, stream: str, epoch: int) -> None:
        """Store that an epoch of the server has begun."""
        epochs = self.server_epochs() | {stream: epoch}
        write_atomically(self.folder / _SERVER_EPOCHS_FILE, json.dumps(epochs, sort_keys=True).encode())

    def needs_renewal(self) -> bool:
        """Whether the certificate is to be renewed, judged by the time floor: the clock may be wrong."""
        certificate = load_certificate(self.folder / _CERTIFICATE_FILE, "the device's certificate")
        try:
            admitted_at = int((self.folder / _ADMISSION_TIME_FILE).read_text())
        except (OSError, ValueError):
            return True
        return self.trusted_time.floor >= admitted_at + RENEWAL_SHARE * (
            seconds_of(certificate.not_valid_after_utc) - admitted_at
        )

    def tls_context(self, authority: Path | None = None, *, with_certificate: bool = True) -> PinnedContext:
        """A TLS context for connections to a broker of `authority`, by default the fleet's.

        Without the certificate only a renewal is possible. Raises `IdentityError` if the device hasn't joined, or a
        file is damaged.
        """
        certificate_path, key_path = (
            (self.folder / _CERTIFICATE_FILE, self.folder / _TLS_KEY_FILE) if with_certificate else (None, None)
        )
        context = pinned_context(
            authority or self.folder / _AUTHORITY_FILE, certificate_path, key_path, lambda: self.trusted_time.floor
        )
        context.foreign_message = "" if authority else _FOREIGN_BROKER_MESSAGE
        return context

    def _pending_request(self) -> JoinRequest | None:
        try:
            request = parse_message((self.folder / _REQUEST_FILE).read_bytes())
            key = load_tls_key(self.folder / _NEW_TLS_KEY_FILE)
            is_own_key = isinstance(request, JoinRequest) and key.public_key() == request_key(request.csr)
        except (OSError, ProtocolError, IdentityError):
            return None  # no request, or a power cut before it was complete, so that it was not sent
        if not isinstance(request, JoinRequest) or not is_own_key or request.key != self.key.verifying_key.hex:
            return None
        return request if (request.site, request.device) == (self.site, self.device) else None

    def _check_certificate_name(self) -> None:
        """Refuse the files of another device, as a copy of its folder has them: brokers and servers know it by them.
        A device of the same name may be at another site."""
        path = self.folder / _CERTIFICATE_FILE
        if not path.exists():
            return
        uri = certificate_uri(load_certificate(path, "the device's certificate"))
        if uri != device_uri(self.site, self.device):
            site, _, device = one_line(uri.partition("://")[2], 129).rpartition("/")  # two names of at most 64
            raise IdentityError(
                f"{self.folder} is the identity of another device",
                expected=f"a certificate for {self.device} of site {self.site}",
                got=f"one for {device} of site {site}" if device and site else "one that names no device",
                hint=f"Use its --device and --site, or another --state for {self.device}.",
            )

    def _adopt_new_tls_key(self) -> None:
        """Put the new TLS key in its place if the certificate is for it; also called at the start, after a power
        cut."""
        new_key_path = self.folder / _NEW_TLS_KEY_FILE
        if not new_key_path.exists() or not (self.folder / _CERTIFICATE_FILE).exists():
            return
        certificate = load_certificate(self.folder / _CERTIFICATE_FILE, "the device's certificate")
        try:
            is_own_key = key_digest(load_tls_key(new_key_path).public_key()) == key_digest(certificate.public_key())
        except IdentityError:
            return
        if is_own_key:
            with storage_errors(f"can't write {self.folder}"):
                new_key_path.replace(self.folder / _TLS_KEY_FILE)
                (self.folder / _REQUEST_FILE).unlink(missing_ok=True)
                flush_folder(self.folder)
