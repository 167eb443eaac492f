"""X.509: TLS keys, certificate requests and certificates.

TLS keys are ECDSA on P-256, which every broker accepts; many hosted ones reject Ed25519 certificates.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedprune.core.disk import read_file
from fedprune.core.errors import IdentityError, ProtocolError, path_remedy, value_text
from fedprune.security.private_file import read_private, write_private

# Bytes of an authority's pin: with 96 bits a second authority with the same one can't be made.
PIN_BYTES = 12

# Bytes of a certificate or request; ours have about 1,000. The limit bounds what a stranger can make the parser read.
MAX_PEM_BYTES = 8192

# What the clock of a board shows before it has the time; certificates have to be valid by then.
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

TlsKey = ec.EllipticCurvePrivateKey
# What the package cryptography raises for damaged input: which of them depends on the damaged field.
_PARSE_ERRORS = (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm)


@dataclass(frozen=True)
class Signer:
    """A certificate authority's key and certificate."""

    key: TlsKey
    certificate: x509.Certificate


def make_tls_key() -> TlsKey:
    return ec.generate_private_key(ec.SECP256R1())


def save_tls_key(key: TlsKey, path: Path) -> None:
    """Write a key as PKCS8 PEM with mode 0600, durably. Raises `StorageError` if the disk fails or is full."""
    write_private(path, tls_key_pem(key))


def tls_key_pem(key: TlsKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_tls_key(path: Path, what: str = "TLS key") -> TlsKey:
    """Read a key that `save_tls_key` wrote. Raises `IdentityError` if it is missing, open to other users, or no such
    key."""
    raw = read_private(path, what)
    try:
        key = serialization.load_pem_private_key(raw, None)
    except _PARSE_ERRORS as error:
        raise IdentityError(f"{what} {path}", expected="an ECDSA key in PEM", got="something else") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"{what} {path}", expected="an ECDSA key on P-256", got=type(key).__name__)
    return key


def common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def make_request(key: TlsKey, device: str) -> str:
    """A request (PKCS #10) for a certificate, as PEM, signed by the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name(device))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def request_key(pem: str, device: str | None = None) -> ec.EllipticCurvePublicKey:
    """The key of a certificate request, which must be signed by it; other contents are ignored.

    Raises `ProtocolError` if the request is invalid or too long, names another device than `device` (None: any), isn't
    signed by its key, or has no P-256 key.
    """
    what = "certificate request"
    if len(pem) > MAX_PEM_BYTES:
        raise ProtocolError(what, expected=f"at most {MAX_PEM_BYTES} characters", got=len(pem))
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        is_genuine, subject = request.is_signature_valid, request.subject
    except (*_PARSE_ERRORS, InvalidSignature) as error:
        raise ProtocolError(what, expected="PKCS #10 in PEM", got=value_text(pem)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ProtocolError(f"{what}: key", expected="ECDSA on P-256", got=type(key).__name__)
    if not is_genuine:
        raise ProtocolError(f"{what} is not signed by its own key")
    if device is not None and _common_name_of(subject) != device:
        raise ProtocolError(f"{what}: common name", expected=device, got=value_text(_common_name_of(subject)))
    return key


def read_certificate(pem: str | bytes, what: str) -> x509.Certificate:
    """Read a certificate without verifying it. Raises `ProtocolError` if it is invalid or too long."""
    raw = pem.encode() if isinstance(pem, str) else pem
    if len(raw) > MAX_PEM_BYTES:
        raise ProtocolError(what, expected=f"at most {MAX_PEM_BYTES} bytes", got=len(raw))
    try:
        certificate = x509.load_pem_x509_certificate(raw)
        # The package parses these on access, which would be long after anybody expects an error.
        certificate.public_key(), certificate.subject, certificate.not_valid_after_utc
        return certificate
    except _PARSE_ERRORS as error:
        raise ProtocolError(what, expected="a certificate in PEM", got=value_text(raw)) from error


def load_certificate(path: Path, what: str) -> x509.Certificate:
    """Read a certificate from a file. Raises `IdentityError` if the file is missing, a link or holds no certificate."""
    try:
        return read_certificate(read_file(path, own=True), f"{what} {path}")
    except OSError as error:
        raise IdentityError(f"{what}: can't read {path} ({error.strerror})", hint=path_remedy(error)) from error
    except ProtocolError as error:
        raise IdentityError(error.what, expected=error.expected, got=error.got) from error


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def pem_of(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_digest(key: object) -> bytes:
    """sha256 of a public key (its SubjectPublicKeyInfo in DER). Raises `ProtocolError` if it is no elliptic curve
    key."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError("key of a certificate", expected="an ECDSA key", got=type(key).__name__)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).digest()


def pin_of(authority: x509.Certificate) -> bytes:
    """The fingerprint of an authority in claims: the first 12 bytes of its key's sha256. Raises `ProtocolError` if its
    key is of another kind."""
    return key_digest(authority.public_key())[:PIN_BYTES]


def certificate_name(certificate: x509.Certificate) -> str:
    """The common name of a certificate; empty if it has none or several."""
    return _common_name_of(certificate.subject)


def _common_name_of(subject: x509.Name) -> str:
    attributes = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attributes[0].value) if len(attributes) == 1 else ""


def certificate_uri(certificate: x509.Certificate) -> str:
    """The URI in a certificate, as a device's has one (`device_uri`); empty if it has none or several."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 else ""


def device_uri(site: str, device: str) -> str:
    """The device's URI in its certificate, in addition to the common name."""
    return f"fedprune://{site}/{device}"


def subject_host(host: str) -> x509.GeneralName:
    """A host as a broker's certificate names it. Raises `IdentityError` if it is neither name nor address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    labels = host.rstrip(".").split(".")
    if not 1 <= len(host) <= 253 or not all(_is_dns_label(label) for label in labels):
        raise IdentityError("host of a broker", expected="a DNS name or an IP address", got=value_text(host))
    return x509.DNSName(host.rstrip("."))


def _is_dns_label(label: str) -> bool:
    return 1 <= len(label) <= 63 and label.isascii() and label.replace("-", "").isalnum() and label.strip("-") == label


def seconds_of(when: datetime) -> int:
    return int(when.timestamp())


def datetime_of(seconds: float) -> datetime:
    """A time in seconds since 1970 as a `datetime` in whole seconds, the precision of certificates."""
    return EPOCH + timedelta(seconds=int(seconds))
