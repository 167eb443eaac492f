"""The fleet's certificate authority: issued certificates, their contents, and revocations.

A folder holds it:

    authority.key    its ECDSA key, mode 0600
    authority.pem    its own certificate, which boards and brokers trust
    register.jsonl   every certificate that was issued, and every one revoked (`fedprune.security.register`)
    crl.pem          the list of revoked certificates that a broker loads (`fedprune.security.register`)

Every certificate is valid from 1970 on, because a board's or broker's clock may say so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import make_private_folder, storage_errors
from fedprune.core.errors import IdentityError, ProtocolError, StorageError, shown
from fedprune.security.certificates import (
    EPOCH,
    Signer,
    TlsKey,
    common_name,
    device_uri,
    host_name,
    key_digest,
    load_certificate,
    load_tls_key,
    make_tls_key,
    moment_of,
    pem_of,
    pin_of,
    read_certificate,
    request_key,
    save_tls_key,
    seconds_of,
)
from fedprune.security.private_file import write_public
from fedprune.security.register import Register, RevocationList
from fedprune.security.tls import BUILT
from fedprune.wire.topics import check_device, check_name

KEY, CERTIFICATE, REGISTER, CRL = "authority.key", "authority.pem", "register.jsonl", "crl.pem"

SERVER = "fedprune-server"
"""Common name of the server's own certificate: brokers know the server by it, so no device may have it."""

DEVICE, CLIENT, BROKER = "device", "server", "broker"
"""Kinds of certificates."""

AUTHORITY_DAYS, DEVICE_DAYS, BROKER_DAYS = 30 * 365, 2 * 365, 5 * 365
MAX_LIVE = 64
"""Certificates of one device that have not ended."""

_DAY = 24 * 3600
_LONGEST_DAYS = 30 * 365


@dataclass(frozen=True)
class Issued:
    """A certificate in the register: `key` is the hex sha256 of its public key, `ends` is in seconds since 1970."""

    serial: int
    kind: str
    name: str
    key: str
    ends: int
    pem: str


class Authority:
    """A certificate authority in a folder, as `make` leaves it; with `read_only` nothing can be issued or revoked.

    Raises:
        IdentityError: A file is missing or damaged, or key and certificate don't fit.
        StorageError: The register is missing or damaged.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time, *, read_only: bool = False) -> None:
        self._clock = clock
        self._signer = _load_signer(folder)
        self.certificate = self._signer.certificate
        self._list = RevocationList(folder / CRL, self._signer)
        self._issued: dict[int, Issued] = {}
        self._by_key: dict[str, Issued] = {}
        self._revoked: dict[int, int] = {}
        if not (folder / REGISTER).exists():  # a new one would admit revoked devices again
            raise StorageError(f"{folder / REGISTER} is missing", hint="Restore the backup of the identity folder.")
        self._register = Register(folder / REGISTER, self._take, read_only=read_only)
        if read_only:
            return
        with self._register.held():
            # The signed list counts, too: a disk that lost writes may have lost lines of the register.
            for serial, at in self._list.revoked().items():
                if serial not in self._revoked:
                    self._register.append(_revocation(serial, at))
            self._list.write(self._revoked)  # a crash may have come between the register's last line and the list

    @classmethod
    def make(cls, folder: Path, site: str, clock: Callable[[], float] = time.time) -> Authority:
        """A new authority in a folder that has none. Raises `IdentityError` if there is one already, and
        `ProtocolError` if the site's name is invalid."""
        check_name(site, "site")
        if (folder / CERTIFICATE).exists():
            raise IdentityError(f"{folder} has an authority already")
        with storage_errors(f"can't write {folder}"):
            make_private_folder(folder)
        key = make_tls_key()
        certificate = _self_signed(key, _subject(site), clock)
        save_tls_key(key, folder / KEY)
        write_whole(folder / REGISTER, b"", private=True)
        write_public(folder / CERTIFICATE, pem_of(certificate).encode())  # last: with it the authority is there
        return cls(folder, clock)

    @property
    def ends(self) -> int:
        """When the authority's own certificate ends, in seconds since 1970."""
        return seconds_of(self.certificate.not_valid_after_utc)

    @property
    def pem(self) -> str:
        return pem_of(self.certificate)

    @property
    def pin(self) -> bytes:
        return pin_of(self.certificate)

    @property
    def crl_path(self) -> Path:
        return self._list.path

    def sign(self, data: bytes) -> bytes:
        """ECDSA over SHA-256, in DER, by the authority's key; `data` begins with its domain."""
        return self._signer.key.sign(data, ec.ECDSA(hashes.SHA256()))

    def now(self) -> int:
        """The time in seconds since 1970, never before this software was built."""
        return int(max(self._clock(), BUILT))

    def made_for(self, site: str) -> bool:
        """Whether it was made for this site, as far as its certificate tells: names are cut there."""
        return self.certificate.subject == _subject(site)

    def issue_device(self, site: str, device: str, csr: str, days: int = DEVICE_DAYS) -> str:
        """A client certificate for a device (PEM); the existing one if its key has one already.

        Of the request (`csr`) only the key is used. If this raises, nothing was issued.

        Raises:
            IdentityError: The name is reserved, the key's certificate is another's, revoked or expired, or the device
                has too many.
            ProtocolError: The request or name is invalid.
        """
        check_name(site, "site")
        check_device(device)
        if device == SERVER:
            raise IdentityError(f"no device may be called {SERVER!r}", hint="Give it another name.")
        key = request_key(csr)
        with self._register.held():
            known = self._known(device, key)
            if known is not None:
                return known.pem
            names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(device_uri(site, device))])
            return self._issue(DEVICE, device, key, days, ExtendedKeyUsageOID.CLIENT_AUTH, names)

    def check_device(self, device: str, csr: str) -> None:
        """Check that `issue_device` would issue this, before a claim is used up. Raises `IdentityError`,
        `ProtocolError`, `StorageError` if it would not."""
        with self._register.held():
            self._known(device, request_key(csr))

    def issue_server(self, csr: str) -> str:
        """A certificate for the server itself to connect with, named `fedprune-server`. Raises `ProtocolError` if
        the request is invalid."""
        key = request_key(csr)
        with self._register.held():
            return self._issue(CLIENT, SERVER, key, DEVICE_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def issue_broker(self, hosts: Iterable[str], csr: str, days: int = BROKER_DAYS) -> str:
        """A certificate for a broker that boards and server reach by these names and addresses.

        Raises:
            IdentityError: No host, or one that is neither name nor address.
            ProtocolError: The request is invalid.
        """
        names = [host_name(h) for h in hosts]
        if not names:
            raise IdentityError("a broker's certificate needs a host", expected="a name or an address", got="none")
        key = request_key(csr)
        first = str(names[0].value)[:64]
        with self._register.held():
            return self._issue(
                BROKER, first, key, days, ExtendedKeyUsageOID.SERVER_AUTH, x509.SubjectAlternativeName(names)
            )

    def of_device(self, device: str) -> list[Issued]:
        """All certificates of a device, in the order in which they were issued."""
        return [i for i in self._issued.values() if i.kind == DEVICE and i.name == device]

    def is_revoked(self, serial: int) -> bool:
        return serial in self._revoked

    def revoke(self, serial: int) -> None:
        """Revoke a certificate. Brokers know when they load the list again. Raises `IdentityError` if it was never
        issued here."""
        with self._register.held():
            self._revoke([serial])

    def revoke_device(self, device: str) -> int:
        """Revoke all certificates of a device; returns their number."""
        with self._register.held():
            serials = [i.serial for i in self.of_device(device) if i.serial not in self._revoked]
            self._revoke(serials)
        return len(serials)

    def lines(self, start: int = 0) -> tuple[list[str], int]:
        """The register's lines from a byte on, and where the next one will begin: all that was issued and revoked.
        Raises `StorageError` if the register is damaged or can't be read."""
        with self._register.held():
            return self._register.lines(start)

    def adopt(self, lines: Iterable[str]) -> None:
        """Add the lines of another copy of this authority's register, with their revocations. Raises `StorageError` and
        adds none if one is damaged."""
        with self._register.held():
            known = set(self._register.lines()[0])
            entries = []
            for line in lines:
                if line not in known:
                    try:
                        entry = json.loads(line)
                        _parsed(entry)
                    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                        raise StorageError("a shared line of the register is damaged", got=shown(line)) from error
                    entries.append(entry)
            if entries:
                self._register.append(*entries)
            self._list.write(self._revoked)

    def _revoke(self, serials: list[int]) -> None:
        for serial in serials:
            if serial not in self._issued:
                raise IdentityError(f"no certificate with serial number {serial:x} was issued here")
            if serial not in self._revoked:
                self._register.append(_revocation(serial, self.now()))
        self._list.write(self._revoked)

    def _known(self, device: str, key: ec.EllipticCurvePublicKey) -> Issued | None:
        """The valid certificate of a device's key; None if it may get one."""
        known = self._by_key.get(key_digest(key).hex())
        if known is not None:
            if (known.kind, known.name) != (DEVICE, device):
                raise IdentityError(f"the TLS key of {device} has a certificate of {known.kind} {shown(known.name)}")
            if known.serial in self._revoked:
                raise IdentityError(f"the certificate of {device}'s TLS key is revoked", hint="Make a new key.")
            if known.ends <= self.now():
                raise IdentityError(f"the certificate of {device}'s TLS key is over", hint="Make a new key.")
            return known
        live = [
            issued
            for issued in self.of_device(device)
            if issued.serial not in self._revoked and issued.ends > self.now()
        ]
        if len(live) >= MAX_LIVE:
            raise IdentityError(f"{device} has {len(live)} certificates", hint="Revoke or replace the device.")
        return None

    def _issue(
        self,
        kind: str,
        name: str,
        key: ec.EllipticCurvePublicKey,
        days: int,
        purpose: x509.ObjectIdentifier,
        alternatives: x509.SubjectAlternativeName | None,
    ) -> str:
        if not 1 <= days <= _LONGEST_DAYS:
            raise IdentityError("days of a certificate", expected=f"1 to {_LONGEST_DAYS}", got=days)
        signer = self._signer
        ends = min(moment_of(self.now() + days * _DAY), signer.certificate.not_valid_after_utc)
        serial = x509.random_serial_number()
        usage = dict.fromkeys(_USAGES, False) | {"digital_signature": True}
        builder = (
            _builder(common_name(name), signer.certificate.subject, key, ends, serial)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        pem = pem_of(builder.sign(signer.key, hashes.SHA256()))
        entry = {"serial": f"{serial:x}", "kind": kind, "name": name, "at": self.now(), "pem": pem}
        self._register.append({"issued": entry})
        return pem

    def _take(self, entry: dict[str, Any]) -> None:
        parsed = _parsed(entry)
        if isinstance(parsed, Issued):
            self._issued[parsed.serial] = parsed
            self._by_key[parsed.key] = parsed
        else:
            serial, at = parsed
            self._revoked[serial] = at

    def crl_is_right(self) -> bool:
        """Whether the list of revoked certificates exists and agrees with the register."""
        return self._list.is_right(self._revoked)


def _parsed(entry: dict[str, Any]) -> Issued | tuple[int, int]:
    """A line of the register: a certificate, or the serial number and the time of a revocation. Raises `ValueError`,
    `KeyError`, `TypeError`, `AttributeError` if the line is damaged."""
    if "revoked" in entry:
        return int(entry["revoked"]["serial"], 16), int(entry["revoked"]["at"])
    row = entry["issued"]
    try:
        certificate = read_certificate(row["pem"], "certificate")
    except ProtocolError as error:
        raise ValueError(str(error)) from error
    ends = seconds_of(certificate.not_valid_after_utc)
    digest = key_digest(certificate.public_key()).hex()
    return Issued(int(row["serial"], 16), row["kind"], row["name"], digest, ends, row["pem"])


def _revocation(serial: int, at: int) -> dict[str, Any]:
    return {"revoked": {"serial": f"{serial:x}", "at": at}}


def _load_signer(folder: Path) -> Signer:
    path = folder / KEY
    certificate = load_certificate(folder / CERTIFICATE, "the authority's certificate")
    key = load_tls_key(path, "the authority's key")
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"{path} and {folder / CERTIFICATE} don't belong together", hint="Restore both from the same backup."
        )
    return Signer(key, certificate)


def _self_signed(key: TlsKey, name: x509.Name, clock: Callable[[], float]) -> x509.Certificate:
    ends = moment_of(max(clock(), BUILT) + AUTHORITY_DAYS * _DAY)
    usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _builder(name, name, key.public_key(), ends, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(EPOCH)
        .not_valid_after(ends)
    )


def _subject(site: str) -> x509.Name:
    return common_name(f"fedprune {site[:40]} authority")
