"""One-time claims: short texts with which one device may join, and by which it authenticates its server.

    FP1-OBKTJ3AI-7P6NWUH3-...

and 5 more groups of 8 base32 characters (RFC 4648): 5 bytes of id, 15 of secret, 12 of pin, 3 of check.

The secret is never sent: a key derived from it authenticates the request. The pin is the beginning of the sha256 of the
authority's public key, which signs the answer. A thief of the text can join in the device's place until the claim is
used or expires, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedprune.core.errors import JoinError

PREFIX = "FP1"
ID, SECRET, PIN, CHECK = 5, 15, 12, 3
"""Bytes of the parts; with 96 bits of pin a second authority with the same one can't be made."""

_GROUP = 8
_LONGEST = 200
_SLIPS = str.maketrans("08", "OB")  # digits that the alphabet lacks, for the letters that look like them


@dataclass(frozen=True)
class Claim:
    """The parts of a claim: its id at the server, the secret that its holder shares with the server, and the pin of the
    server's authority."""

    id: bytes
    secret: bytes = field(repr=False)
    pin: bytes

    @classmethod
    def make(cls, pin: bytes) -> Claim:
        """A new claim, from the operating system's random numbers."""
        return cls(secrets.token_bytes(ID), secrets.token_bytes(SECRET), pin)

    @classmethod
    def parse(cls, text: str) -> Claim:
        """Read a claim in upper or lower case, with any spaces and dashes. Raises `JoinError` if the text is no
        claim, or mistyped."""
        plain = re.sub(r"[\s-]", "", text[:_LONGEST]).upper()
        if not plain.startswith(PREFIX):
            raise JoinError("claim", expected=f"a text that begins with {PREFIX}-", got="something else")
        body = plain[len(PREFIX) :].translate(_SLIPS)
        length = (ID + SECRET + PIN + CHECK) * 8 // 5
        try:
            raw = base64.b32decode(body) if len(body) == length else b""
        except ValueError:
            raw = b""
        if not raw or raw[-CHECK:] != _check(raw[:-CHECK]):
            raise JoinError(
                "the claim is mistyped",
                expected=f"{length} characters after {PREFIX} whose check is right",
                got=f"{len(body)} characters",
                hint="Copy it again; it has the letters A to Z and the digits 2 to 7.",
            )
        return cls(raw[:ID], raw[ID : ID + SECRET], raw[ID + SECRET : -CHECK])

    @property
    def text(self) -> str:
        """The text that `parse` reads."""
        raw = self.id + self.secret + self.pin
        body = base64.b32encode(raw + _check(raw)).decode()
        return "-".join([PREFIX, *(body[i : i + _GROUP] for i in range(0, len(body), _GROUP))])

    @property
    def key(self) -> bytes:
        """Key that authenticates requests, HKDF-SHA256 of the secret; the server stores it instead of the secret."""
        return HKDF(hashes.SHA256(), 32, salt=self.id, info=b"fedprune claim 1").derive(self.secret)


def mac(key: bytes, data: bytes) -> str:
    """HMAC-SHA256 as hex, by a claim's key."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def same(one: str | bytes, other: str | bytes) -> bool:
    """Whether two texts or two byte strings are equal, in constant time."""
    return hmac.compare_digest(*(v.encode() if isinstance(v, str) else v for v in (one, other)))


def _check(raw: bytes) -> bytes:
    return hashlib.sha256(b"fedprune claim text\0" + raw).digest()[:CHECK]
