"""Verification of Ed25519 signatures (RFC 8032, 5.1.7) with only the standard library.

The launcher and a kit's installer decide what may be imported, so they can't import a library of the release that they
check. Nothing here is secret: `fedprune.security.keys` makes signatures.
"""

from __future__ import annotations

import hashlib

_P = 2**255 - 19  # the prime of the field
_ORDER = 2**252 + 27742317777372353535851937790883648493  # of the group that the base point generates
_D = -121665 * pow(121666, -1, _P) % _P  # the curve's constant: -x² + y² = 1 + d·x²·y²
_ROOT_OF_MINUS_ONE = pow(2, (_P - 1) // 4, _P)  # of -1

_Point = tuple[int, int, int, int]  # X, Y, Z and T of a point (X/Z, Y/Z) with T = XY/Z

_ZERO: _Point = (0, 1, 1, 0)


def verify_signature(key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether a signature of 64 bytes over some data was made with a key of 32 bytes."""
    if len(signature) != 64:
        return False
    public, commitment = _decode_point(key), _decode_point(signature[:32])
    scalar = int.from_bytes(signature[32:], "little")
    # A scalar beyond the order would be a second valid signature of the same data (RFC 8032, 5.1.7, step 1).
    if public is None or commitment is None or scalar >= _ORDER:
        return False
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + key + data).digest(), "little") % _ORDER
    left, right = _multiply_point(scalar, _BASE), _add_points(commitment, _multiply_point(challenge, public))
    # Two points are equal if X/Z and Y/Z are; multiplied crosswise, no inverse is needed.
    return (left[0] * right[2] - right[0] * left[2]) % _P == 0 and (left[1] * right[2] - right[1] * left[2]) % _P == 0


def _add_points(first: _Point, second: _Point) -> _Point:
    a = (first[1] - first[0]) * (second[1] - second[0]) % _P
    b = (first[1] + first[0]) * (second[1] + second[0]) % _P
    c = 2 * first[3] * second[3] * _D % _P
    d = 2 * first[2] * second[2] % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _multiply_point(scalar: int, point: _Point) -> _Point:
    product = _ZERO
    while scalar:
        if scalar & 1:
            product = _add_points(product, point)
        point = _add_points(point, point)
        scalar >>= 1
    return product


def _decode_point(raw: bytes) -> _Point | None:
    """A point from its canonical 32 bytes; None if they are not canonical."""
    if len(raw) != 32:
        return None
    y = int.from_bytes(raw, "little")
    is_odd, y = y >> 255, y & (2**255 - 1)
    if y >= _P:
        return None
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    x = pow(square, (_P + 3) // 8, _P)
    if (x * x - square) % _P:
        x = x * _ROOT_OF_MINUS_ONE % _P
    if (x * x - square) % _P or (x == 0 and is_odd):
        return None
    x = _P - x if x & 1 != is_odd else x
    return x, y, 1, x * y % _P


_BASE = _decode_point((4 * pow(5, -1, _P) % _P).to_bytes(32, "little")) or _ZERO
