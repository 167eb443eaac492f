"""The list of revoked certificates for brokers, in PEM (RFC 5280, section 5).

It never expires: a broker with an expired list refuses every client, which would lock a fleet out. While one authority
replaces another the file has a list of each, with the same serial numbers: brokers look for the list of the authority
that issued a certificate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from fedprune.security.certificates import EPOCH, Signer, moment_of, seconds_of
from fedprune.security.private_file import write_public

_LIST = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


class RevocationList:
    """The list's file, derived from an authority's register and signed by each trusted authority."""

    def __init__(self, path: Path, signers: Sequence[Signer]) -> None:
        self.path = path
        self._signers = tuple(signers)

    def is_right(self, revoked: Mapping[int, int]) -> bool:
        """Whether the file exists and each authority's list has these certificates (revocation times by serial
        number)."""
        found = self._read()
        return len(found) == len(self._signers) and all(
            crl.is_signature_valid(signer.key.public_key()) and {r.serial_number for r in crl} == set(revoked)
            for crl, signer in zip(found, self._signers, strict=True)
        )

    def revoked(self) -> dict[int, int]:
        """Revocation times by serial number; empty if the file is missing or not the authority's."""
        keys = [signer.key.public_key() for signer in self._signers]
        signed = (crl for crl in self._read() if any(crl.is_signature_valid(key) for key in keys))
        return {r.serial_number: seconds_of(r.revocation_date_utc) for crl in signed for r in crl}

    def _read(self) -> list[x509.CertificateRevocationList]:
        """The stored lists; none if one of them is damaged."""
        try:
            return [x509.load_pem_x509_crl(part) for part in _LIST.findall(self.path.read_bytes())]
        except (OSError, ValueError, UnsupportedAlgorithm):
            return []

    def write(self, revoked: Mapping[int, int]) -> None:
        """Write the list, unless it is up to date; `revoked` is as for `is_right`."""
        if not self.is_right(revoked):
            write_public(self.path, b"".join(_signed(signer, revoked) for signer in self._signers))


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
