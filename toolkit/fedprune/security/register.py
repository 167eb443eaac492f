"""The authority's append-only register of certificates, and the list of revoked ones that is made of it for brokers.

A line is on the disk before its certificate is handed out. Several processes may use the register: a writer holds the
file's lock, for which it waits without end, and first reads the lines that others have appended.

The list (PEM; RFC 5280, section 5) never expires: a broker with an expired list refuses every client, which would lock
a fleet out.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from fedprune.core.disk import storage_errors, sync_folder, write_all
from fedprune.core.errors import StorageError
from fedprune.core.lock_wait import LockWait, file_lock_holders
from fedprune.security.certificates import EPOCH, Signer, moment_of, seconds_of
from fedprune.security.private_file import write_public

_PAUSE_S = 0.02
"""Between two attempts to take the register's lock: most are held for the two or three milliseconds of an fsync."""


class Register:
    """An append-only file of JSON lines, made with mode 0600 if it does not exist.

    Raises `StorageError` if a line is damaged.

    Args:
        take: Called for every line in order: existing ones, and later ones as they are read or appended.
        read_only: Nothing is made, repaired or appended, so that a read-only disk suffices.
    """

    def __init__(self, path: Path, take: Callable[[dict[str, Any]], None], *, read_only: bool = False) -> None:
        self._path = path
        self._take = take
        self._read_only = read_only
        self._read = 0  # bytes
        self._holding = -1
        with self.held():
            pass

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for appending, with all lines read."""
        with storage_errors(f"can't use {self._path}"):
            new = not self._path.exists()
            how = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
            descriptor = os.open(self._path, how | os.O_CLOEXEC, 0o600)
        try:
            with storage_errors(f"can't use {self._path}"):
                self._lock(descriptor)
                if new:
                    sync_folder(self._path.parent)
                self._catch_up(descriptor)
            self._holding = -1 if self._read_only else descriptor
            yield
        finally:
            self._holding = -1
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        how = fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX
        wait = LockWait(str(self._path), lambda: file_lock_holders(self._path))
        while True:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:  # noqa: PERF203 - each turn waits anyway
                wait.note()
                time.sleep(_PAUSE_S)
            else:
                wait.done()
                return

    def append(self, *entries: dict[str, Any]) -> None:
        """Add lines; all are on the disk when this returns, and none if it raises. Only while it is `held`."""
        if self._holding < 0:
            raise StorageError(f"{self._path} is not held")
        lines = [json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n" for entry in entries]
        raw = b"".join(lines)
        with storage_errors(f"can't write {self._path}"):
            try:
                write_all(self._holding, raw, self._read)
                os.fsync(self._holding)
            except OSError:
                os.ftruncate(self._holding, self._read)
                raise
        self._read += len(raw)
        for entry in entries:
            self._take(entry)

    def lines(self, start: int = 0) -> tuple[list[str], int]:
        """The raw lines from a byte on, and where the next one will begin; complete while the register is held."""
        with storage_errors(f"can't read {self._path}"), self._path.open("rb") as file:
            file.seek(start)
            return file.read(self._read - start).decode(errors="replace").splitlines(), self._read

    def _catch_up(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size < self._read:
            raise StorageError(f"{self._path} has become shorter", hint="Restore the backup of the identity folder.")
        raw = os.pread(descriptor, size - self._read, self._read)
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw) and not self._read_only:  # torn by a power cut: its certificate was not handed out
            os.ftruncate(descriptor, self._read + whole)
            os.fsync(descriptor)
        try:
            for line in raw[:whole].splitlines():
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{self._path} is damaged ({error})", hint="Restore the backup of the identity folder."
            ) from error
        self._read += whole


class RevocationList:
    """The list's file, derived from an authority's register and signed by the authority."""

    def __init__(self, path: Path, signer: Signer) -> None:
        self.path = path
        self._signer = signer

    def is_right(self, revoked: Mapping[int, int]) -> bool:
        """Whether the file exists, is the authority's, and has these certificates (revocation times by serial
        number)."""
        crl = self._read()
        return crl is not None and {r.serial_number for r in crl} == set(revoked)

    def revoked(self) -> dict[int, int]:
        """Revocation times by serial number; empty if the file is missing or not the authority's."""
        return {r.serial_number: seconds_of(r.revocation_date_utc) for r in self._read() or ()}

    def _read(self) -> x509.CertificateRevocationList | None:
        """The stored list; None if it is missing, damaged or not the authority's."""
        try:
            crl = x509.load_pem_x509_crl(self.path.read_bytes())
            return crl if crl.is_signature_valid(self._signer.key.public_key()) else None
        except (OSError, ValueError, UnsupportedAlgorithm):
            return None

    def write(self, revoked: Mapping[int, int]) -> None:
        """Write the list, unless it is up to date; `revoked` is as for `is_right`."""
        if not self.is_right(revoked):
            write_public(self.path, _signed(self._signer, revoked))


def _signed(signer: Signer, revoked: Mapping[int, int]) -> bytes:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(EPOCH)
        .next_update(signer.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(len(revoked) + 1), critical=False)
        .add_extension(issuer, critical=False)
    )
    for serial, at in revoked.items():
        row = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment_of(at)).build()
        builder = builder.add_revoked_certificate(row)
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
