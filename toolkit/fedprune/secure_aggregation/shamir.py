"""Shamir's secret sharing over a prime field (Shamir 1979): t shares give the secret, fewer nothing about it.

The secret is the value at 0 of a random polynomial of degree t − 1, and the share of holder x its value at x, from 1
up. Any t − 1 shares fit every secret equally well.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from fedprune.core.errors import ProtocolError

# The smallest prime above all secrets.
PRIME = 2**256 + 297

SECRET_BYTES = 32
SHARE_BYTES = 33  # an element of the field, big-endian


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
