"""A board's keys for one secure sum, and the keys that two boards agree on.

A board draws new ones for each sum:

- a *channel key* (X25519, RFC 7748), from which each pair of boards gets two keys of AES-128-GCM, one for each
  direction, that encrypt the shares which the server passes on;
- a *mask key* (X25519), from which each pair gets the key of the mask that one of them adds and the other subtracts.
  If the board drops out, its neighbours restore this key, and the server computes the pair's masks;
- a *seed*, of the mask that the board adds alone. If the board delivers, its neighbours restore it. So an update that
  is late, after the mask key was restored, is still masked (Bonawitz et al. 2017, Sec. 4).

The public keys and a commitment to the seed are signed by the board's identity key, together with the session and the
board's name: neither another board nor another sum can pass them off as its own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedprune.core.errors import ProtocolError
from fedprune.secure_aggregation.masks import MASK_KEY_BYTES
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.security.keys import SIGNATURE_BYTES, SigningKey, VerifyingKey, transcript

# The smallest prime above all secrets.
PRIME = 2**256 + 297

SECRET_BYTES = 32
SHARE_BYTES = 33  # an element of the field, big-endian
PUBLIC_KEY_BYTES = 32  # a commitment is as long
ADVERTISEMENT_BYTES = 3 * PUBLIC_KEY_BYTES + SIGNATURE_BYTES
SEALED_BYTES = 2 * SHARE_BYTES + 16  # a pair of shares, with its tag
_NONCE = bytes(12)  # each key encrypts one message only


@dataclass(frozen=True)
class Advertisement:
    """A board's public keys for one sum, signed."""

    channel: bytes
    mask: bytes
    commitment: bytes
    signature: bytes

    @classmethod
    def from_bytes(cls, raw: bytes) -> Advertisement:
        """Read an advertisement without verifying it. Raises `ProtocolError` for another length."""
        if len(raw) != ADVERTISEMENT_BYTES:
            raise ProtocolError("bytes of an advertisement", expected=ADVERTISEMENT_BYTES, got=len(raw))
        return cls(
            raw[:PUBLIC_KEY_BYTES],
            raw[PUBLIC_KEY_BYTES : 2 * PUBLIC_KEY_BYTES],
            raw[2 * PUBLIC_KEY_BYTES : 3 * PUBLIC_KEY_BYTES],
            raw[3 * PUBLIC_KEY_BYTES :],
        )

    def to_bytes(self) -> bytes:
        return self.channel + self.mask + self.commitment + self.signature

    def verify(self, session: SecureSumSession, board: str, key: VerifyingKey) -> None:
        """Make sure that a board's identity key has signed it for this sum, and that others can agree on keys with it.
        Raises `SignatureError`, or `ProtocolError` for a public key of small order: the server must find it before the
        board's neighbours do, who would have to give up, as if it were their fault."""
        key.verify(self.signature, _signed_text(session, board, self.channel, self.mask, self.commitment))
        for public in (self.channel, self.mask):
            _agree_on_secret(X25519PrivateKey.generate(), public)


class BoardKeys:
    """A board's secret keys for one sum, from the operating system's random numbers; they are never stored."""

    def __init__(self) -> None:
        self._channel = X25519PrivateKey.generate()
        self._mask = X25519PrivateKey.generate()
        self.seed = secrets.token_bytes(SECRET_BYTES)

    @property
    def mask_secret(self) -> bytes:
        """The second secret of which neighbours get shares, after the seed."""
        return self._mask.private_bytes_raw()

    def advertise(self, session: SecureSumSession, board: str, identity: SigningKey) -> Advertisement:
        channel, mask = (k.public_key().public_bytes_raw() for k in (self._channel, self._mask))
        commitment = commitment_to(session, board, self.seed)
        return Advertisement(
            channel, mask, commitment, identity.sign(_signed_text(session, board, channel, mask, commitment))
        )

    def seal_shares(
        self, session: SecureSumSession, board: str, to: str, advertisement: Advertisement, shares: bytes
    ) -> bytes:
        """Shares for a neighbour, encrypted; called once per neighbour."""
        return AESGCM(self._seal_key(session, board, to, advertisement)).encrypt(_NONCE, shares, None)

    def open_shares(
        self, session: SecureSumSession, board: str, sender: str, advertisement: Advertisement, sealed: bytes
    ) -> bytes:
        """Shares from a neighbour. Raises `ProtocolError`, which names the neighbour, if they are damaged."""
        try:
            shares = AESGCM(self._seal_key(session, sender, board, advertisement)).decrypt(_NONCE, sealed, None)
        except InvalidTag as error:
            raise ProtocolError(f"shares from {sender} don't decrypt", hint="They were changed on the way.") from error
        for share in (shares[:SHARE_BYTES], shares[SHARE_BYTES:]):
            check_share(share)
        return shares

    def mask_key(self, session: SecureSumSession, board: str, neighbour: str, advertisement: Advertisement) -> bytes:
        """The key of the mask of this board and another one."""
        return pair_mask_key(session, self._mask, board, neighbour, advertisement.mask)

    def _seal_key(self, session: SecureSumSession, sender: str, receiver: str, advertisement: Advertisement) -> bytes:
        # One key per direction: under one key, the nonce, which is constant, would be used twice.
        purpose = transcript("fedprune secure sum shares 1", session.digest, sender, receiver)
        return _derive_key(_agree_on_secret(self._channel, advertisement.channel), purpose)


def own_mask_key(session: SecureSumSession, board: str, seed: bytes) -> bytes:
    """The key of the mask that a board adds alone."""
    return _derive_key(seed, transcript("fedprune secure sum own mask 1", session.digest, board))


def pair_mask_key(
    session: SecureSumSession, secret: X25519PrivateKey, board: str, neighbour: str, public: bytes
) -> bytes:
    """The key of two boards' mask, from the secret mask key of one and the public one of the other."""
    # Both boards must get the same key, whoever computes it: the names are sorted.
    purpose = transcript("fedprune secure sum pair mask 1", session.digest, *sorted((board, neighbour)))
    return _derive_key(_agree_on_secret(secret, public), purpose)


def restored_mask_key(secret: bytes, public: bytes) -> X25519PrivateKey:
    """A secret mask key from what its shares gave. Raises `ProtocolError` if it isn't that of the public one."""
    key = X25519PrivateKey.from_private_bytes(secret)
    if key.public_key().public_bytes_raw() != public:
        raise ProtocolError("restored mask key", expected="that of the board's public key", got="another one")
    return key


def commitment_to(session: SecureSumSession, board: str, seed: bytes) -> bytes:
    """A hash that identifies a restored seed. The mask's key is derived from the seed with another domain."""
    return hashlib.sha256(transcript("fedprune secure sum commitment 1", session.digest, board, seed)).digest()


def _agree_on_secret(secret: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order, with which every secret agrees on zeros
        raise ProtocolError("public key of a board", expected="a point of X25519", got="one of small order") from error


def _derive_key(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), MASK_KEY_BYTES, None, purpose).derive(secret)


def _signed_text(session: SecureSumSession, board: str, channel: bytes, mask: bytes, commitment: bytes) -> bytes:
    return transcript("fedprune secure sum keys 1", session.digest, board, channel, mask, commitment)


# Shamir's secret sharing over a prime field (Shamir 1979): t shares give the secret, fewer nothing about it. The secret
# is the value at 0 of a random polynomial of degree t − 1, and the share of holder x its value at x, from 1 up. Any
# t − 1 shares fit every secret equally well.
def split_secret(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """Shares of a secret of 32 bytes for holders 1, 2, ..., any `threshold` of which give it back."""
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_polynomial_value(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, holders + 1)]


def check_share(share: bytes) -> None:
    """Make sure that bytes of a share's length are an element of the field. Raises `ProtocolError`."""
    if int.from_bytes(share, "big") >= PRIME:
        raise ProtocolError("share of a secret", expected="a number below the field's prime", got="a larger one")


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of checked shares by holder; the first `threshold` of them are used. Raises `ProtocolError` if there
    are fewer, or they are of no secret of 32 bytes, as when one was forged."""
    if len(shares) < threshold:
        raise ProtocolError("shares of a secret", expected=f"{threshold} or more", got=len(shares))
    points = sorted(shares)[:threshold]
    total = 0
    for x in points:
        # Lagrange's basis polynomial of x at 0.
        numerator = denominator = 1
        for other_point in points:
            if other_point != x:
                numerator = numerator * other_point % PRIME
                denominator = denominator * (other_point - x) % PRIME
        total += int.from_bytes(shares[x], "big") * numerator * pow(denominator, -1, PRIME)
    secret = total % PRIME
    # Only some forged shares show here: most give a wrong secret, which callers compare with what the board has signed.
    if secret >> (8 * SECRET_BYTES):
        raise ProtocolError("shares of a secret", expected="shares of one secret", got="a share that was changed")
    return secret.to_bytes(SECRET_BYTES, "big")


def _polynomial_value(coefficients: list[int], x: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % PRIME
    return total
