"""A claim: a short text with which one device may join the fleet at once, without the operator's approval.

It looks like FP1-OBKTJ3AI-7P6NWUH3-... with 5 more groups of 8 base32 characters (RFC 4648): 5 bytes of id, 15 of
secret, 12 of pin, 3 of check. The secret is never sent: a key derived from it authenticates the request. The pin
is the beginning of the sha256 of the authority's public key. A thief of the text can join in the device's place until
the claim is used or expires, and nothing else. A claim for one device alone ends in @ and its name, so that nobody who
has many mixes them up; the server knows the device without it.
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
from fedprune.security.certificates import PIN_BYTES
from fedprune.wire.topics import check_device

CLAIM_PREFIX = "FP1"
# Bytes of a claim's parts other than the pin. With 120 bits a secret can't be guessed, and three bytes of check miss
# one mistyped claim in 16 million; with the pin that makes 56 base32 characters, seven groups of eight.
CLAIM_ID_BYTES, CLAIM_SECRET_BYTES, CLAIM_CHECK_BYTES = 5, 15, 3

_GROUP_LENGTH = 8
# A claim has 66 characters with its dashes, to which people may have added spaces, and a name at most 65.
_MAX_TEXT_LENGTH = 200
_LOOKALIKES = str.maketrans("08", "OB")  # base32 lacks these digits, which look like letters


@dataclass(frozen=True)
class JoinClaim:
    """The parts of a claim: its id at the server, the secret that the server knows, too, the authority's pin, and the
    only device that may join with it, or None for any."""

    id: bytes
    secret: bytes = field(repr=False)
    pin: bytes
    device: str | None = None

    @classmethod
    def make(cls, pin: bytes, device: str | None = None) -> JoinClaim:
        """A new claim, from the operating system's random numbers."""
        return cls(secrets.token_bytes(CLAIM_ID_BYTES), secrets.token_bytes(CLAIM_SECRET_BYTES), pin, device)

    @classmethod
    def parse(cls, text: str, where: str = "the given text", device: str | None = None) -> JoinClaim:
        """Read a claim in upper or lower case, with any spaces and dashes, from a text that may have claims for other
        devices than `device` in further lines; `where` names the text in messages. Raises `JoinError` if it is no
        claim, one for other devices, several, or mistyped."""
        lines = [line for line in text.splitlines() if line.strip().upper().startswith(CLAIM_PREFIX)]
        if len(lines) > 1:
            own_lines = [line for line in lines if device is not None and line.partition("@")[2].strip() == device]
            if len(own_lines) != 1:
                raise JoinError(
                    f"{where} holds {len(lines)} claims", expected="one, or one that ends in @ and the device's name",
                    got=f"{len(own_lines)} for {device}" if device else len(lines),
                    hint="Give every board a file with one of them.",
                )  # fmt: skip
            text = own_lines[0]
        code, _, name = text[:_MAX_TEXT_LENGTH].partition("@")
        compact = re.sub(r"[\s-]", "", code).upper()
        if not compact.startswith(CLAIM_PREFIX):
            beginning, hint = f"a text that begins with {CLAIM_PREFIX}-", "`fedprune-server claim` makes one."
            raise JoinError(f"{where} holds no claim", expected=beginning, got="something else", hint=hint)
        if len(name.split()) > 1:  # perhaps another claim, which no message may show
            raise JoinError(
                f"{where} holds more than a claim", expected="a line for each claim", got="more after its device",
                hint="`fedprune-server claim --out FILE` writes such lines.",
            )  # fmt: skip
        body = compact[len(CLAIM_PREFIX) :].translate(_LOOKALIKES)
        length = (CLAIM_ID_BYTES + CLAIM_SECRET_BYTES + PIN_BYTES + CLAIM_CHECK_BYTES) * 8 // 5
        try:
            raw = base64.b32decode(body) if len(body) == length else b""
        except ValueError:
            raw = b""
        if not raw or raw[-CLAIM_CHECK_BYTES:] != _checksum(raw[:-CLAIM_CHECK_BYTES]):
            raise JoinError(
                "the claim is mistyped",
                expected=f"{length} characters after {CLAIM_PREFIX} whose check is right",
                got=f"{len(body)} characters",
                hint="Copy it again; it has the letters A to Z and the digits 2 to 7.",
            )
        secret_end = CLAIM_ID_BYTES + CLAIM_SECRET_BYTES
        named = check_device(name.strip(), "the device of the claim", error=JoinError) if name.strip() else None
        if device is not None and named not in (None, device):
            raise JoinError(
                "the claim is another device's", expected=f"one for {device}", got=f"one for {named}",
                hint=f"`fedprune-server claim --device {device}` makes one.",
            )  # fmt: skip
        return cls(raw[:CLAIM_ID_BYTES], raw[CLAIM_ID_BYTES:secret_end], raw[secret_end:-CLAIM_CHECK_BYTES], named)

    @property
    def text(self) -> str:
        raw = self.id + self.secret + self.pin
        body = base64.b32encode(raw + _checksum(raw)).decode()
        code = "-".join([CLAIM_PREFIX, *(body[i : i + _GROUP_LENGTH] for i in range(0, len(body), _GROUP_LENGTH))])
        return code if self.device is None else f"{code}@{self.device}"

    @property
    def key(self) -> bytes:
        """Key that authenticates requests, HKDF-SHA256 of the secret; the server stores it instead of the secret."""
        return HKDF(hashes.SHA256(), 32, salt=self.id, info=b"fedprune claim 1").derive(self.secret)


def claim_mac(key: bytes, data: bytes) -> str:
    """HMAC-SHA256 as hex, by a claim's key."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def is_same(left: str | bytes, right: str | bytes) -> bool:
    """Whether two texts or two byte strings are equal, in constant time: it tells nothing about a secret."""
    return hmac.compare_digest(*(v.encode() if isinstance(v, str) else v for v in (left, right)))


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(b"fedprune claim text\0" + raw).digest()[:CLAIM_CHECK_BYTES]
