"""Boards that join without a broker, and the certificates that a server's database has of them."""

from pathlib import Path

import sqlalchemy as sql

from fedprune.security.certificates import TlsKey, make_request, make_tls_key
from fedprune.security.joining import make_join_request
from fedprune.security.keys import SigningKey
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.tables import CERTIFICATES


def member_certificate(identity: IdentityFolder, device: str) -> tuple[str, TlsKey]:
    """The certificate of a board that joins with a claim, and its key."""
    key = make_tls_key()
    request = make_request(key, device)
    asked = make_join_request(identity.site, device, SigningKey.make(), request, identity.make_claim(device, 3600))
    certificate = EnrollmentService(identity).answer(asked).certificate
    assert certificate is not None
    return certificate, key


def serials_of(state: Path, device: str, url: str | None = None) -> set[int]:
    """Serial numbers of all certificates of a device."""
    query = sql.select(CERTIFICATES.c.serial).where(CERTIFICATES.c.device == device)
    with open_database(state, url, read_only=True) as database:
        return {int(text, 16) for text in database.read(lambda c: list(c.execute(query).scalars()))}
