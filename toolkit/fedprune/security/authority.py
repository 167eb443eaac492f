"""The fleet's certificate authority: the certificates that it issues, and the list of those that are revoked.

A folder holds it:

    authority.key    its ECDSA key, mode 0600
    authority.pem    its own certificate, which boards and brokers trust
    crl.pem          the list of revoked certificates that a broker loads (PEM; RFC 5280, section 5)

The server's database (`fedprune_server.enrollment.store`) holds which certificates were issued and which are revoked;
the list is made from it. The list never expires: a broker with an expired list refuses every client, which would lock
the whole fleet out.

Every certificate is valid from 1970 on, because a board's or broker's clock may say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedprune.core.disk import make_private_folder, read_file, storage_errors
from fedprune.core.errors import IdentityError
from fedprune.security.certificates import (
    EPOCH,
    Signer,
    TlsKey,
    common_name,
    datetime_of,
    device_uri,
    load_certificate,
    load_tls_key,
    make_tls_key,
    pem_of,
    pin_of,
    request_key,
    save_tls_key,
    seconds_of,
    subject_host,
)
from fedprune.security.private_file import write_public
from fedprune.security.trusted_time import BUILD_TIME
from fedprune.wire.topics import check_device, check_topic_name

AUTHORITY_KEY_FILE, AUTHORITY_CERTIFICATE_FILE, CRL_FILE = "authority.key", "authority.pem", "crl.pem"

# Common name of the server's own certificate: brokers know the server by it, so no device may have it.
SERVER_COMMON_NAME = "fedprune-server"

# A device renews its own certificate. A broker's is often replaced by hand, so it lasts longer; the authority's can't
# be replaced without letting every board join again, so it has to outlive them.
AUTHORITY_DAYS, DEVICE_DAYS, BROKER_DAYS = 30 * 365, 2 * 365, 5 * 365
_DAY = 24 * 3600
_MAX_DAYS = 30 * 365


class Authority:
    """A certificate authority in a folder, which `make` has made. Raises `IdentityError` if a file is missing or
    damaged, or key and certificate don't fit."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._signer = _load_signer(folder)
        self.certificate = self._signer.certificate
        self.crl_path = folder / CRL_FILE

    @classmethod
    def make(cls, folder: Path, site: str, clock: Callable[[], float] = time.time) -> Authority:
        """A new authority in a folder that has none. Raises `IdentityError` if there is one already, and
        `ProtocolError` if the site's name is invalid."""
        check_topic_name(site, "site")
        if (folder / AUTHORITY_CERTIFICATE_FILE).exists():
            raise IdentityError(f"{folder} has an authority already")
        with storage_errors(f"can't write {folder}"):
            make_private_folder(folder)
        key = make_tls_key()
        certificate = _self_signed_certificate(key, _authority_name(site), clock)
        save_tls_key(key, folder / AUTHORITY_KEY_FILE)
        write_public(folder / CRL_FILE, _revocation_list(Signer(key, certificate), {}))
        # Last: with it the authority is there.
        write_public(folder / AUTHORITY_CERTIFICATE_FILE, pem_of(certificate).encode())
        return cls(folder, clock)

    @property
    def valid_until(self) -> int:
        """The end of the authority's own certificate, in seconds since 1970."""
        return seconds_of(self.certificate.not_valid_after_utc)

    @property
    def pem(self) -> str:
        return pem_of(self.certificate)

    @property
    def pin(self) -> bytes:
        return pin_of(self.certificate)

    def sign(self, data: bytes) -> bytes:
        """ECDSA over SHA-256, in DER, by the authority's key; `data` begins with its domain."""
        return self._signer.key.sign(data, ec.ECDSA(hashes.SHA256()))

    def now(self) -> int:
        """The time in seconds since 1970, but never before this software was built: the clock may be unset."""
        return int(max(self._clock(), BUILD_TIME))

    def is_for_site(self, site: str) -> bool:
        """Whether it was made for this site, as far as its certificate tells: that has only a name's beginning."""
        return self.certificate.subject == _authority_name(site)

    def issue_device(self, site: str, device: str, csr: str, days: int = DEVICE_DAYS) -> str:
        """A client certificate for a device (PEM). Of the request (`csr`) only the key is used.

        Raises `IdentityError` if the name is reserved, and `ProtocolError` if the request or name is invalid.
        """
        check_topic_name(site, "site")
        check_device(device)
        if device == SERVER_COMMON_NAME:
            raise IdentityError(f"no device may be called {SERVER_COMMON_NAME!r}", hint="Give it another name.")
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(device_uri(site, device))])
        return self._issue(device, request_key(csr), days, ExtendedKeyUsageOID.CLIENT_AUTH, names)

    def issue_server(self, csr: str) -> str:
        """A certificate for the server itself to connect with, named `fedprune-server`. Raises `ProtocolError` if
        the request is invalid."""
        return self._issue(SERVER_COMMON_NAME, request_key(csr), DEVICE_DAYS, ExtendedKeyUsageOID.CLIENT_AUTH, None)

    def issue_broker(self, hosts: Iterable[str], csr: str, days: int = BROKER_DAYS) -> str:
        """A certificate for a broker that boards and server reach by these names and addresses.

        Raises `IdentityError` without a host, or for one that is neither name nor address, and `ProtocolError` if the
        request is invalid.
        """
        names = [subject_host(h) for h in hosts]
        if not names:
            raise IdentityError("a broker's certificate needs a host", expected="a name or an address", got="none")
        alternatives = x509.SubjectAlternativeName(names)
        subject_name = str(names[0].value)[:64]  # X.509 allows a common name no more characters
        return self._issue(subject_name, request_key(csr), days, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)

    def is_list_current(self, revoked: Mapping[int, int]) -> bool:
        """Whether the list on the disk is this authority's and has exactly these certificates (revocation times by
        serial number)."""
        try:
            crl = x509.load_pem_x509_crl(read_file(self.crl_path, own=True))
            is_genuine = crl.is_signature_valid(self._signer.key.public_key())
        except (OSError, ValueError, UnsupportedAlgorithm):
            return False
        return is_genuine and {r.serial_number for r in crl} == set(revoked)

    def write_revocation_list(self, revoked: Mapping[int, int]) -> None:
        """Write the list unless it is up to date; `revoked` is as for `is_list_current`.

        When it takes effect is up to each broker, which has to load it again.
        """
        if not self.is_list_current(revoked):
            write_public(self.crl_path, _revocation_list(self._signer, revoked))

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        days: int,
        purpose: x509.ObjectIdentifier,
        alternatives: x509.SubjectAlternativeName | None,
    ) -> str:
        if not 1 <= days <= _MAX_DAYS:
            raise IdentityError("days of a certificate", expected=f"1 to {_MAX_DAYS}", got=days)
        signer = self._signer
        # Clients check the chain: a certificate that outlives its authority's would be refused from then on anyway.
        valid_until = min(datetime_of(self.now() + days * _DAY), signer.certificate.not_valid_after_utc)
        serial = x509.random_serial_number()
        usage = dict.fromkeys(_KEY_USAGES, False) | {"digital_signature": True}
        builder = (
            _certificate_builder(common_name(name), signer.certificate.subject, key, valid_until, serial)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        )
        if alternatives is not None:
            builder = builder.add_extension(alternatives, critical=False)
        return pem_of(builder.sign(signer.key, hashes.SHA256()))


def _revocation_list(signer: Signer, revoked: Mapping[int, int]) -> bytes:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(EPOCH)
        .next_update(signer.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(len(revoked) + 1), critical=False)
        .add_extension(issuer, critical=False)
    )
    for serial, revoked_at in revoked.items():
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(datetime_of(revoked_at)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _load_signer(folder: Path) -> Signer:
    path = folder / AUTHORITY_KEY_FILE
    certificate = load_certificate(folder / AUTHORITY_CERTIFICATE_FILE, "the authority's certificate")
    key = load_tls_key(path, "the authority's key")
    if key.public_key() != certificate.public_key():
        what = f"{path} and {folder / AUTHORITY_CERTIFICATE_FILE} don't belong together"
        raise IdentityError(what, hint="Restore both from the same backup.")
    return Signer(key, certificate)


def _self_signed_certificate(key: TlsKey, name: x509.Name, clock: Callable[[], float]) -> x509.Certificate:
    valid_until = datetime_of(max(clock(), BUILD_TIME) + AUTHORITY_DAYS * _DAY)
    usage = dict.fromkeys(_KEY_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _certificate_builder(name, name, key.public_key(), valid_until, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


_KEY_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def _certificate_builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid_until: datetime, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(EPOCH)
        .not_valid_after(valid_until)
    )


def _authority_name(site: str) -> x509.Name:
    return common_name(f"fedprune {site[:40]} authority")
