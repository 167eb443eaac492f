"""Ed25519 keys (RFC 8032), with which server and devices sign, and an unambiguous encoding of values to be signed."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedprune.core.errors import IdentityError, ProtocolError, SignatureError, value_text
from fedprune.core.validation import ErrorClass, is_digest
from fedprune.security.private_file import read_private, write_private

# Bytes of a verifying key.
KEY_BYTES = 32

# Bytes of a signature.
SIGNATURE_BYTES = 64

# Bytes by which a message names its sender's key. They only select a key, whose signature is then verified.
KEY_ID_BYTES = 8


@dataclass(frozen=True)
class VerifyingKey:
    """The public half of a signing key, 32 bytes; raises `ProtocolError` for another length."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ProtocolError("verifying key", expected=f"{KEY_BYTES} bytes", got=len(self.raw))

    @classmethod
    def from_hex(cls, text: object, what: str = "verifying key", *, error: ErrorClass = ProtocolError) -> VerifyingKey:
        """Read 64 lower-case hex digits; raises `error`, which names `what`, for anything else."""
        if is_digest(text):
            return cls(bytes.fromhex(text))
        raise error(what, expected="64 hex digits", got=value_text(text))

    @property
    def hex(self) -> str:
        return self.raw.hex()

    @property
    def id(self) -> bytes:
        """The key's id in a message's header: the beginning of its sha256."""
        return hashlib.sha256(self.raw).digest()[:KEY_ID_BYTES]

    @property
    def fingerprint(self) -> str:
        """For people: the first 80 bits of the key's sha256 as five groups of four hex digits."""
        return grouped_digits(hashlib.sha256(self.raw).hexdigest()[:20])

    def verify(self, signature: bytes, data: bytes) -> None:
        """Make sure that the key's owner signed it. Raises `SignatureError` if the owner did not."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError) as error:
            hint = "The message was changed in transit, or another sender wrote it."
            raise SignatureError(f"the signature is not that of key {self.fingerprint}", hint=hint) from error


class SigningKey:
    """A secret key. It never leaves the machine that made it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifying_key = VerifyingKey(key.public_key().public_bytes_raw())

    @classmethod
    def make(cls) -> SigningKey:
        """A new key, from the operating system's random numbers."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key that `save` wrote. Raises `IdentityError` if it is missing, open to other users, or no Ed25519
        key in PKCS8 PEM without a password."""
        raw = read_private(path, "signing key")
        try:
            key = serialization.load_pem_private_key(raw, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise IdentityError(
                f"signing key {path}", expected="an Ed25519 key in PEM", got="something else"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"signing key {path}", expected="an Ed25519 key", got=type(key).__name__)
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PKCS8 PEM with mode 0600; after a crash the file is whole or not there."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(path, pem)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"SigningKey({self.verifying_key.fingerprint})"


def grouped_digits(digits: str) -> str:
    """Hex digits in groups of four, for people."""
    return "-".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def transcript(domain: str, *values: str | bytes | int | None) -> bytes:
    """Encode values to be signed, each with its kind and length: different values give different bytes.

    The domain comes first, so that a signature for one purpose is none for another.
    """
    encoded = [domain.encode() + b"\0"]
    for value in values:
        if value is None:
            kind, raw = b"-", b""
        elif isinstance(value, bytes):
            kind, raw = b"b", value
        elif isinstance(value, int):
            kind, raw = b"n", str(value).encode()
        else:
            kind, raw = b"t", value.encode()
        encoded.append(kind + struct.pack("<I", len(raw)) + raw)
    return b"".join(encoded)
