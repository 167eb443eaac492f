"""Ed25519 signatures of what a server gives its boards to run, and the key files that they are made and checked with.

The one place of fedprune that knows how releases are signed. Signatures are those of RFC 8032 over a purpose and the
bytes, so that what was signed for one purpose is worth nothing for another.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedprune.disk import storage_errors
from fedprune.errors import ConfigError

SIZE = 64
"""Bytes of a signature."""

_LARGEST_KEY_FILE = 16_384


def sign(key: Ed25519PrivateKey, purpose: str, data: bytes) -> bytes:
    """Sign bytes for a purpose; the signature has `SIZE` bytes."""
    return key.sign(_framed(purpose, data))


def verified(key: Ed25519PublicKey, purpose: str, data: bytes, signature: bytes) -> bool:
    """Whether a signature was made with a key's private half, over these bytes and for this purpose."""
    try:
        key.verify(signature, _framed(purpose, data))
    except InvalidSignature:
        return False
    return True


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read a key to sign with, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ConfigError: It is no such key, or has a password.
        StorageError: It can't be read.
    """
    try:
        key = serialization.load_pem_private_key(_pem(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "a private Ed25519 key as PEM, without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "a private Ed25519 key as PEM, without a password")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """Read a key to check signatures with, as `openssl pkey -pubout` writes it.

    Raises:
        ConfigError: It is no such key.
        StorageError: It can't be read.
    """
    try:
        key = serialization.load_pem_public_key(_pem(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path, "a public Ed25519 key as PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "a public Ed25519 key as PEM")
    return key


def _framed(purpose: str, data: bytes) -> bytes:
    return f"fedprune {purpose}\n".encode() + data


def _pem(path: Path) -> bytes:
    with storage_errors(f"can't read {path}"), path.open("rb") as file:
        return file.read(_LARGEST_KEY_FILE)


def _no_key(path: Path, expected: str) -> ConfigError:
    return ConfigError(
        f"the key {path}", expected=expected, hint="`openssl genpkey -algorithm ed25519` makes one; see docs."
    )
