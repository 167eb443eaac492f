"""A server's identity: its authority, its keys, and whom it has let in. `<state>/identity`, mode 0700.

    authority.key, authority.pem, register.jsonl, crl.pem    the certificate authority (`fedprune.security.authority`)
    authority.key.new    its successor's key, while that one replaces it
    signing.key     what the server signs its messages with
    signing.key.new its successor, while it is being replaced
    successions.json    by which boards follow from earlier keys to that one (`fedprune.security.succession`)
    epoch           its latest epoch
    server.key, server.pem    what it connects to the broker with
    broker.key, broker.pem    of the embedded broker, if there is one
    web.key, web.pem          of the web server of blobs, if there is one
    identity.db     claims, devices and answers (`fedprune_server.enrollment.store`)
    site            the site's name; written last, so that a folder with it is whole

Whoever has this folder is the server: back it up, and keep it to yourself.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from cryptography import x509

from fedprune.core.closing import Closing
from fedprune.core.errors import IdentityError, JoinError, ProtocolError, StorageError, remedy
from fedprune.core.text import quantity, some
from fedprune.security.authority import CERTIFICATE, DEVICE_DAYS, SERVER, Authority
from fedprune.security.certificates import (
    key_digest,
    load_certificate,
    load_tls_key,
    make_request,
    make_tls_key,
    save_tls_key,
    seconds_of,
)
from fedprune.security.joining import Claim
from fedprune.security.keys import SigningKey
from fedprune.security.private_file import give_to_owner_of, write_public
from fedprune.security.signed_channel import EpochFile
from fedprune.security.succession import FILE as _SUCCESSIONS
from fedprune.security.succession import NEW, Succession, load_signing_key, read_successions
from fedprune.security.tls import PinnedContext, pinned_context
from fedprune.wire.messages import MAX_SUCCESSIONS
from fedprune.wire.topics import check_device, check_name
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_server.enrollment.store import APPROVED, REVOKED, Device, IdentityStore

log = logging.getLogger("fedprune.server")

FOLDER = "identity"
_SIGNING, _EPOCH, _KEY, _CERTIFICATE, _STORE, _SITE = (
    "signing.key", "epoch", "server.key", "server.pem", "identity.db", "site",
)  # fmt: skip
_NEW_SIGNING = _SIGNING + NEW
_BROKER_LASTS_S = 365 * 24 * 3600
_SERVER_LASTS_S = DEVICE_DAYS * 24 * 3600 // 3
_BROKER_KEY, _BROKER_CERTIFICATE = "broker.key", "broker.pem"
_WEB_KEY, _WEB_CERTIFICATE = "web.key", "web.pem"


class IdentityFolder(Closing):
    """A server's identity. Every method raises `StorageError` if the disk fails or is full.

    Args:
        clock: Seconds since 1970.
        read_only: Only look: nothing is made, mended or issued, and a disk that can't be written to will do.

    Attributes:
        key: What the server signs its messages with.
        successions: Of the signing key, the oldest first.
        store: Claims, devices and answers.

    Raises:
        IdentityError: There is none, or a file of it is damaged or open to other users.
        StorageError: The folder is a device's.
    """

    def __init__(self, state: Path, clock: Callable[[], float] = time.time, *, read_only: bool = False) -> None:
        self.path = state / FOLDER
        try:
            self.site = check_name((self.path / _SITE).read_text().strip(), "site")
        except FileNotFoundError as error:
            if (self.path / _STORE).exists():  # all that is made before the name
                raise IdentityError(
                    f"{self.path / _SITE} is missing", hint="Write the site's name into it, or restore a backup of it."
                ) from error
            check_unowned(state)
            raise IdentityError(
                f"{state} has no identity", hint=f"Make one: fedprune-server init --state {state}"
            ) from error
        except OSError as error:
            refused = isinstance(error, PermissionError)
            hint = "Run the command as the server's user, who alone may read its keys." if refused else remedy(error)
            raise StorageError(f"can't read {self.path / _SITE}: {error.strerror}", hint=hint) from error
        except (UnicodeDecodeError, ProtocolError) as error:
            raise IdentityError(f"{self.path / _SITE} is damaged", hint="Write the site's name into it.") from error
        self._clock = clock
        self.authority = Authority(self.path, clock, read_only=read_only)
        self.successions = read_successions(self.path, self.site)
        self.key = load_signing_key(self.path / _SIGNING, self.successions, read_only=read_only)
        self.epochs = EpochFile(self.path / _EPOCH, clock)
        self.store = IdentityStore(self.path / _STORE, read_only=read_only)
        self._issuing = threading.Lock()
        if not read_only:
            self.revoke_again()

    def rotate(self) -> None:
        """Replace the signing key; boards follow by the succession that the old key signs.

        No server may run on the folder. A crash leaves the old key, or the new one with its succession.
        """
        new = SigningKey.make()
        new.save(self.path / _NEW_SIGNING)
        give_to_owner_of(self.path / _NEW_SIGNING, self.path / _SIGNING)
        made = Succession.make(self.site, self.key, new.verifying)
        kept = (*self.successions, made)[-MAX_SUCCESSIONS:]
        write_public(self.path / _SUCCESSIONS, json.dumps([s.hex for s in kept], indent=1).encode())  # now it counts
        self.successions = kept
        self.key = load_signing_key(self.path / _SIGNING, kept)

    def rotate_authority(self) -> None:
        """Begin to replace the certificate authority: boards and server get certificates of the new one.

        No server may run on the folder. Raises `IdentityError` if it is being replaced already.
        """
        self.authority.begin_rotation(self.site)
        self.authority = Authority(self.path, self._clock)

    def retire_authority(self, *, force: bool = False) -> None:
        """End the replacement of the certificate authority: the old one counts no more.

        No server may run on the folder. Raises `IdentityError` if the authority is not being replaced, or, without
        `force`, if boards have no certificate of the new one yet: they would have to join again.
        """
        if (left := self.without_new_certificate()) and not force:
            raise IdentityError(
                f"{quantity(len(left), 'board')} would be locked out: no certificate of the new authority yet",
                expected="certificates for all boards",
                got=f"none for {some(left)}",
                hint="Let them connect while the server runs. Revoke boards that are gone; with --force the others "
                "must join again, with a claim.",
            )
        self.authority.end_rotation()
        self.authority = Authority(self.path, self._clock)

    def behind(self, device: Device) -> list[str]:
        """Keys of this server of which an approved device knew an earlier one when it connected last."""
        present = {
            "signing key": (device.server_key, self.key.verifying.id.hex()),
            "certificate authority": (device.authority, self.authority.pins[-1].hex()),
        }
        earlier = [what for what, (known, latest) in present.items() if known not in (None, latest)]
        return earlier if device.status == APPROVED else []

    def without_new_certificate(self) -> list[str]:
        """Approved boards that have not reported a certificate of the authority that replaces the old one."""
        if not self.authority.rotating:
            return []
        latest = self.authority.pins[-1].hex()
        return [d.device for d in self.store.devices() if d.status == APPROVED and d.authority != latest]

    def revoke_again(self) -> None:
        """Revoke the certificates of revoked devices, where a crash or a disk lost that revocation."""
        devices = self.store.devices()
        members = {d.device for d in devices if d.status == APPROVED}
        for device in sorted({d.device for d in devices if d.status == REVOKED} - members):
            if count := self.authority.revoke_device(device):
                log.warning(
                    "%s was revoked, and %s of it still counted; revoked now", device, quantity(count, "certificate")
                )

    @classmethod
    def make(cls, state: Path, site: str, clock: Callable[[], float] = time.time) -> IdentityFolder:
        """A new identity; one that was begun is completed. Raises `IdentityError` if there is one already."""
        check_name(site, "site")
        path = state / FOLDER
        if (path / _SITE).exists():
            raise IdentityError(f"{state} has an identity already", hint="Keep it: every board knows the server by it.")
        authority = Authority(path, clock) if (path / CERTIFICATE).exists() else Authority.make(path, site, clock)
        if not authority.made_for(site):  # under another name no board would hear this server
            raise IdentityError(
                f"the authority in {path} is another site's than {site}",
                got=authority.certificate.subject.rfc4514_string(),
                hint="Give --site as it was when the identity was made.",
            )
        if not (path / _SIGNING).exists():  # boards may know the one that is there
            SigningKey.make().save(path / _SIGNING)
        _issue_server(authority, path)
        if not (path / _EPOCH).exists():
            EpochFile.make(path / _EPOCH)
        IdentityStore(path / _STORE).close()
        write_public(path / _SITE, site.encode())
        return cls(state, clock)

    def close(self) -> None:
        with suppress(StorageError):
            self.store.close()

    def claim(self, device: str | None, seconds: int) -> Claim:
        """A new one-time claim for a device, or for any; only its key is stored, and its text is only in the result.

        Raises `JoinError` or `ProtocolError` if no device may have the name.
        """
        if device is not None and check_device(device) == SERVER:
            raise JoinError(f"no device may be called {SERVER!r}", hint="Choose another name.")
        made, now = Claim.make(self.authority.pin), self.authority.now()
        self.store.add_claim(made, device, now, now + seconds)
        return made

    def revoke(self, device: str) -> tuple[int, int]:
        """Revoke a device's keys at once, its certificates as soon as the broker loads the list again; returns how many
        of both. After an error it can be done again.
        """
        return self.store.revoke(check_device(device), self.authority.now()), self.authority.revoke_device(device)

    def broker(self, hosts: Iterable[str]) -> tuple[Path, Path, Path]:
        """Paths of an embedded broker's certificate, its key, and the authority's certificate.

        The certificate is issued again if the hosts, by which boards reach the broker, have changed, and in its last
        year. Raises `IdentityError` if a host is neither a name nor an address.
        """
        return self._listening(_BROKER_CERTIFICATE, _BROKER_KEY, hosts)

    def web(self, hosts: Iterable[str]) -> tuple[Path, Path, Path]:
        """The same for a web server of blobs."""
        return self._listening(_WEB_CERTIFICATE, _WEB_KEY, hosts)

    def _listening(self, certificate_name: str, key_name: str, hosts: Iterable[str]) -> tuple[Path, Path, Path]:
        certificate, private, wanted = self.path / certificate_name, self.path / key_name, sorted(set(hosts))
        if not self._lasts(certificate, private, _BROKER_LASTS_S, client=False) or _hosts(certificate) != set(wanted):
            key = make_tls_key()
            issued = self.authority.issue_broker(wanted, make_request(key, "broker"))
            save_tls_key(key, private)
            write_public(certificate, issued.encode())
        return certificate, private, self.path / CERTIFICATE

    def context(self, authority: Path | None = None) -> PinnedContext:
        """TLS for the server's own connection to a broker whose certificate `authority`, or else this server, vouches
        for.

        The server's certificate is issued again, with a new key, in the last third of its time: here, because other
        commands may run as another user, such as root, whose files the server couldn't read.
        """
        return pinned_context(*self.client(authority), self.authority.now)

    def client(self, authority: Path | None = None) -> tuple[Path, Path, Path]:
        """Paths of what `context` is made of: the authority, the server's certificate and that one's key."""
        certificate, key = (self.path / name for name in (_CERTIFICATE, _KEY))
        with self._issuing:  # several connections may want it at once
            if not self._lasts(certificate, key, _SERVER_LASTS_S, client=True):
                try:
                    _issue_server(self.authority, self.path)
                except StorageError as error:  # the old one may do until there is room
                    log.warning("no new certificate for the server yet: %s", error)
        return authority or self.path / CERTIFICATE, certificate, key

    def _lasts(self, certificate: Path, key: Path, seconds: int, *, client: bool) -> bool:
        """Whether a certificate is the current authority's and for this key, and lasts long enough."""
        try:
            found = load_certificate(certificate, "certificate")
            if key_digest(found.public_key()) != key_digest(load_tls_key(key).public_key()):
                return False
            if not self.authority.is_current(found, client=client):
                return False
        except (IdentityError, ProtocolError):
            return False
        ends = self.authority.ends(client=client)
        return seconds_of(found.not_valid_after_utc) >= min(self.authority.now() + seconds, ends)


def _issue_server(authority: Authority, folder: Path) -> None:
    key = make_tls_key()
    issued = authority.issue_server(make_request(key, SERVER))
    save_tls_key(key, folder / _KEY)
    write_public(folder / _CERTIFICATE, issued.encode())


def _hosts(certificate: Path) -> set[str]:
    found = load_certificate(certificate, "the broker's certificate")
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(n.value) for n in names}
