"""A server's identity: its authority and its keys in `<state>/identity`, mode 0700, and its members in the database.

    authority.key, authority.pem, crl.pem    the certificate authority (`fedprune.security.authority`)
    signing.key     the key with which the server signs its messages
    epoch           the server's latest epoch
    server.key, server.pem    the certificate with which it connects to the broker
    broker.key, broker.pem    of the embedded broker, if there is one
    web.key, web.pem          of the web server of blobs, if there is one
    console.key, console.pem  for the console, once `identity certificate` has issued it
    site            the site's name; written last, so that a folder with it is whole

Anyone with a copy of this folder can act as the server: back it up, and keep it secret. Claims, devices, their
certificates and answers are in the server's database (`fedprune_server.enrollment.store`).
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from cryptography import x509

from fedprune.core.closeable import Closeable
from fedprune.core.disk import flush_folder, read_file, storage_errors
from fedprune.core.errors import IdentityError, JoinError, ProtocolError, StorageError, path_remedy, search_location
from fedprune.security import certificates
from fedprune.security.authority import (
    AUTHORITY_CERTIFICATE_FILE,
    AUTHORITY_KEY_FILE,
    DEVICE_DAYS,
    SERVER_COMMON_NAME,
    Authority,
)
from fedprune.security.epoch_file import EpochFile
from fedprune.security.join_claim import JoinClaim
from fedprune.security.keys import SigningKey
from fedprune.security.private_file import share_owner, write_public
from fedprune.security.tls import PinnedContext, pinned_context
from fedprune.wire.topics import check_device, check_topic_name
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.storage.database import Database
from fedprune_server.storage.folder_layout import has_database
from fedprune_server.storage.open_database import open_database

log = logging.getLogger("fedprune.server")

IDENTITY_FOLDER = "identity"
_SIGNING_KEY, _EPOCH_FILE, _SITE_FILE = "signing.key", "epoch", "site"
_SERVER_KEY, _SERVER_CERTIFICATE = "server.key", "server.pem"

# The folder of an identity while another one is made in its place.
_REPLACED_FOLDER = "identity.replaced"

# Seconds before its end at which the certificate of a listener (broker or web server) is issued again: a running one
# loads the new certificate only when it starts again, which may take long.
_LISTENER_RENEWAL_S = 365 * 24 * 3600
# The same for the server's own certificate: the last third of its time.
_SERVER_RENEWAL_S = DEVICE_DAYS * 24 * 3600 // 3
_CONSOLE_KEY, CONSOLE_CERTIFICATE = "console.key", "console.pem"


class IdentityFolder(Closeable):
    """A server's identity. Every method raises `StorageError` if the disk fails or is full. The constructor raises
    `IdentityError` if there is none, or a file of it is damaged or open to other users, and `StorageError` if the
    folder is a device's.

    The database is the state folder's, or that of a URL, and is opened when it is needed. A folder that is `read_only`
    makes, repairs and issues nothing, so that a read-only disk will do. The server signs its messages with `key`."""

    def __init__(
        self,
        state: Path,
        clock: Callable[[], float] = time.time,
        *,
        database: str | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = state / IDENTITY_FOLDER
        try:
            self.site = check_topic_name(read_file(self.path / _SITE_FILE, own=True).decode().strip(), "site")
        except FileNotFoundError as error:
            # A device's folder has the same name, but no authority.
            if all((self.path / name).exists() for name in (AUTHORITY_KEY_FILE, _SIGNING_KEY)):
                raise IdentityError(
                    f"{self.path / _SITE_FILE} is missing",
                    hint="Write the site's name into it, or restore a backup of it.",
                ) from error
            check_unowned(state)
            raise IdentityError(
                f"{state} has no identity",
                hint=f"Make one: `fedprune-server init --state {shlex.quote(str(state))}`.{search_location(state)}",
            ) from error
        except OSError as error:
            is_denied = isinstance(error, PermissionError)
            as_owner = "Run the command as the server's user, who alone may read its keys."
            hint = as_owner if is_denied else path_remedy(error)
            raise StorageError(f"can't read {self.path / _SITE_FILE}: {error.strerror}", hint=hint) from error
        except (UnicodeDecodeError, ProtocolError) as error:
            problem = f"{self.path / _SITE_FILE} is damaged"
            raise IdentityError(problem, hint="Write the site's name into it.") from error
        self._clock = clock
        self.authority = Authority(self.path, clock)
        self.key = SigningKey.load(self.path / _SIGNING_KEY)
        self.epochs = EpochFile(self.path / _EPOCH_FILE, clock)
        self._issuing = threading.Lock()
        self._state, self._url, self._read_only = state, database, read_only
        self._store: IdentityStore | None = None
        self._database: Database | None = None  # only one that was opened here is closed here

    @property
    def store(self) -> IdentityStore:
        """Claims, devices and answers. Raises `StorageError` if the database can't be used."""
        if self._store is None:
            missing = self._read_only and self._url is None and not has_database(self._state)
            self._database = None if missing else open_database(self._state, self._url, read_only=self._read_only)
            return self._use_store(self._database)
        return self._store

    def use_database(self, database: Database) -> None:
        """Use the database of the running server from now on; its owner closes it. Raises `IdentityError` if the
        members in it are another identity's, and `StorageError` if the database is damaged."""
        self.close()
        self._use_store(database)

    def _use_store(self, database: Database | None) -> IdentityStore:
        self._store = store = IdentityStore(database)
        if self._read_only:
            return store
        try:
            if not store.claim_identity(self._identity_text):
                raise IdentityError(
                    f"the members in this database are another identity's than that in {self.path}",
                    hint="It was replaced, or made a second time. Copy the folder of the server that has the members; "
                    "if that is lost, run `fedprune-server identity replace`, and let every board join again.",
                )
            self.update_revocations()
        except BaseException:
            self.close()
            raise
        return store

    @property
    def _identity_text(self) -> str:
        """The text by which a database knows the identity of its members."""
        return f"{self.authority.pin.hex()} {self.key.verifying_key.hex}"

    def update_revocations(self) -> None:
        """Bring the list of revoked certificates up to date, if the identity has a database already."""
        if self._store is not None or self._url is not None or has_database(self._state):
            self.authority.write_revocation_list(self.store.revoked_certificates())

    def replace(self) -> IdentityFolder:
        """Replace this identity by a new one with other keys and another authority; returns it.

        The old identity is no longer accepted, and every board must join again with a new claim. No server may run on
        the folder. After an error or a crash the command can be repeated; if the folder is gone by then, `make`
        completes the new identity.
        """
        if (owner := self.path.stat().st_uid) != os.geteuid():  # the server's user could not read the new one
            raise IdentityError(f"{self.path} belongs to user {owner}", hint="Run the command as the server's user.")
        # Members of another identity, such as one that was lost, are voided, too: a new identity is the only cure then.
        with open_database(self._state, self._url) as database:
            IdentityStore(database).void_members(self._identity_text, self.authority.now())
        self.close()
        replaced_folder = self._state / _REPLACED_FOLDER
        with storage_errors(f"can't replace {self.path}"):
            if replaced_folder.exists():
                shutil.rmtree(replaced_folder)
            self.path.rename(replaced_folder)
            flush_folder(self._state)
        return IdentityFolder.make(self._state, self.site, self._clock, database=self._url)

    @classmethod
    def make(
        cls, state: Path, site: str, clock: Callable[[], float] = time.time, *, database: str | None = None
    ) -> IdentityFolder:
        """Make a new identity, or complete one that was begun. Raises `IdentityError` if there is one already."""
        check_topic_name(site, "site")
        path = state / IDENTITY_FOLDER
        if (path / _SITE_FILE).exists():
            raise IdentityError(f"{state} has an identity already", hint="Keep it: every board knows the server by it.")
        is_begun = (path / AUTHORITY_CERTIFICATE_FILE).exists()
        authority = Authority(path, clock) if is_begun else Authority.make(path, site, clock)
        if not authority.is_for_site(site):  # boards with its certificates subscribe to the topics of that other site
            raise IdentityError(
                f"the authority in {path} is another site's than {site}",
                got=authority.certificate.subject.rfc4514_string(),
                hint="Give --site as it was when the identity was made.",
            )
        if not (path / _SIGNING_KEY).exists():  # boards may know the existing one already
            SigningKey.make().save(path / _SIGNING_KEY)
        _issue_server(authority, path)
        if not (path / _EPOCH_FILE).exists():
            EpochFile.make(path / _EPOCH_FILE)
        write_public(path / _SITE_FILE, site.encode())  # last: a folder with this file is complete
        if (replaced_folder := state / _REPLACED_FOLDER).exists():
            with storage_errors(f"can't delete {replaced_folder}"):
                shutil.rmtree(replaced_folder)
        return cls(state, clock, database=database)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
        self._store = self._database = None

    def make_claim(self, device: str | None, seconds: int) -> JoinClaim:
        """Make a one-time claim for a device, or for any (None). Only its key is stored; only the result has its text.

        Raises `JoinError` or `ProtocolError` if no device may have the name.
        """
        if device is not None and check_device(device) == SERVER_COMMON_NAME:
            raise JoinError(f"no device may be called {SERVER_COMMON_NAME!r}", hint="Choose another name.")
        claim, now = JoinClaim.make(self.authority.pin, device), self.authority.now()
        self.store.add_claim(claim, device, now, now + seconds)
        return claim

    def revoke(self, device: str) -> tuple[int, int]:
        """Revoke a device's keys and, with them, its certificates, which the broker refuses once it has loaded the list
        again. Returns the numbers of both.
        """
        revoked = self.store.revoke(check_device(device), self.authority.now())
        self.update_revocations()
        return revoked

    def console_files(self, hosts: Iterable[str]) -> tuple[Path, Path, Path]:
        """Paths of a new certificate for the console, its key, which the server's user can read, and the authority's
        certificate."""
        key, path = certificates.make_tls_key(), self.path / _CONSOLE_KEY
        issued = self.authority.issue_broker(sorted(set(hosts)), certificates.make_request(key, "console"))
        certificates.save_tls_key(key, path)
        # The command may run as root; the console runs as the server's user.
        share_owner(path, self.path / _SIGNING_KEY)
        write_public(self.path / CONSOLE_CERTIFICATE, issued.encode())
        return self.path / CONSOLE_CERTIFICATE, path, self.path / AUTHORITY_CERTIFICATE_FILE

    def listener_files(self, listener: Literal["broker", "web"], hosts: Iterable[str]) -> tuple[Path, Path, Path]:
        """Paths of the certificate of the embedded broker or the web server of blobs, its key, and the authority's.

        The certificate is issued again in its last year, and if the hosts by which boards reach the listener have
        changed. Raises `IdentityError` if a host is neither a name nor an address.
        """
        certificate, key_path = self.path / f"{listener}.pem", self.path / f"{listener}.key"
        sorted_hosts = sorted(set(hosts))
        current = self._lasting_certificate(certificate, key_path, _LISTENER_RENEWAL_S)
        if current is None or set(sorted_hosts) != hosts_of(current):
            key = certificates.make_tls_key()
            issued = self.authority.issue_broker(sorted_hosts, certificates.make_request(key, "broker"))
            certificates.save_tls_key(key, key_path)
            write_public(certificate, issued.encode())
        return certificate, key_path, self.path / AUTHORITY_CERTIFICATE_FILE

    def tls_context(self, authority: Path | None = None) -> PinnedContext:
        """TLS for the server's own connection to a broker with a certificate of `authority`, by default this server's.

        The server's certificate is issued again, with a new key, in the last third of its time. That is done here,
        because other commands may run as another user, such as root, whose files the server couldn't read.
        """
        return pinned_context(*self.client_files(authority), self.authority.now)

    def client_files(self, authority: Path | None = None) -> tuple[Path, Path, Path]:
        """Paths of the files for TLS: the authority, the server's certificate and its key."""
        certificate, key = (self.path / name for name in (_SERVER_CERTIFICATE, _SERVER_KEY))
        with self._issuing:  # several connections may ask for it at once, each on a thread of its own
            if self._lasting_certificate(certificate, key, _SERVER_RENEWAL_S) is None:
                try:
                    _issue_server(self.authority, self.path)
                except StorageError as error:  # the old one may be valid until there is room on the disk
                    log.warning("no new certificate for the server yet: %s", error)
        return authority or self.path / AUTHORITY_CERTIFICATE_FILE, certificate, key

    def _lasting_certificate(self, certificate: Path, key: Path, seconds: int) -> x509.Certificate | None:
        """The certificate in a file, if the authority issued it, it belongs to this key and lasts long enough."""
        try:
            loaded = certificates.load_certificate(certificate, "certificate")
            if certificates.key_digest(loaded.public_key()) != certificates.key_digest(
                certificates.load_tls_key(key).public_key()
            ):
                return None
            if not certificates.is_issued_by(loaded, self.authority.certificate):
                return None
        except (IdentityError, ProtocolError):
            return None
        earliest_end = min(self.authority.now() + seconds, self.authority.valid_until)
        return loaded if certificates.seconds_of(loaded.not_valid_after_utc) >= earliest_end else None


def _issue_server(authority: Authority, folder: Path) -> None:
    key = certificates.make_tls_key()
    issued = authority.issue_server(certificates.make_request(key, SERVER_COMMON_NAME))
    certificates.save_tls_key(key, folder / _SERVER_KEY)
    write_public(folder / _SERVER_CERTIFICATE, issued.encode())


def hosts_of(certificate: x509.Certificate) -> set[str]:
    """The names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(n.value) for n in names}
