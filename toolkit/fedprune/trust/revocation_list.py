"""The list of revoked certificates that a broker loads, in PEM (RFC 5280, section 5).

It never goes out of date: a broker whose list is out of date refuses everybody, which would lock a fleet out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from fedprune.disk import write_whole
from fedprune.trust.certificates import EPOCH, TlsKey, moment_of, seconds_of


class RevocationList:
    """A file that follows from an authority's register.

    Args:
        path: The file.
        key: The authority's key.
        certificate: The authority's certificate.
    """

    def __init__(self, path: Path, key: TlsKey, certificate: x509.Certificate) -> None:
        self.path = path
        self._key, self._certificate = key, certificate

    def is_right(self, revoked: Mapping[int, int]) -> bool:
        """Whether it is there, and has these certificates.

        Args:
            revoked: When they were revoked, in seconds since 1970, by serial number.
        """
        found = self._read()
        return found is not None and {r.serial_number for r in found} == set(revoked)

    def revoked(self) -> dict[int, int]:
        """When the certificates on it were revoked, by serial number; empty if it is missing or not the authority's."""
        return {r.serial_number: seconds_of(r.revocation_date_utc) for r in self._read() or ()}

    def _read(self) -> x509.CertificateRevocationList | None:
        """The stored list, if the authority has signed it."""
        try:
            found = x509.load_pem_x509_crl(self.path.read_bytes())
            return found if found.is_signature_valid(self._key.public_key()) else None
        except (OSError, ValueError, UnsupportedAlgorithm):
            return None

    def write(self, revoked: Mapping[int, int]) -> None:
        """Write it, if it isn't the one that is there.

        Args:
            revoked: As for `is_right`.

        Raises:
            StorageError: The disk fails or is full.
        """
        if self.is_right(revoked):
            return
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(EPOCH)
            .next_update(self._certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(len(revoked) + 1), critical=False)
            .add_extension(issuer, critical=False)
        )
        for serial, at in revoked.items():
            row = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment_of(at)).build()
            builder = builder.add_revoked_certificate(row)
        crl = builder.sign(self._key, hashes.SHA256())
        write_whole(self.path, crl.public_bytes(serialization.Encoding.PEM))
