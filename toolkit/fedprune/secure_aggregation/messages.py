"""The messages of a secure sum, as bytes.

| from, step | content |
|---|---|
| board, advertise | an advertisement (`keys`) |
| server, roster | for each neighbour, by name: length of its name in one byte, name, advertisement |
| board, shares | for each neighbour, in the roster's order: its sealed pair of shares |
| server, delivery | which neighbours have shared, as bits; from each of them its sealed pair |
| board, masked | the masked vector (`masks`) |
| server, survivors | which neighbours' masked vectors have arrived, as bits |
| board, unmasking | for each neighbour that had shared: the share of its seed if it survived, else of its mask key |

Bits are in the roster's order, the lowest of a byte first; spare ones are 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedprune.core.errors import ProtocolError, value_text
from fedprune.secure_aggregation.keys import ADVERTISEMENT_BYTES, SEALED_BYTES, SHARE_BYTES, Advertisement, check_share
from fedprune.secure_aggregation.session import SecureSumSession
from fedprune.wire.topics import check_device


def encode_roster(neighbours: Mapping[str, Advertisement]) -> bytes:
    rows = sorted(neighbours.items())
    return b"".join(bytes([len(name)]) + name.encode() + advertisement.to_bytes() for name, advertisement in rows)


def decode_roster(raw: bytes, session: SecureSumSession) -> dict[str, Advertisement]:
    """A board's neighbours by name, in order, not verified. Raises `ProtocolError` if there are too few or too many, a
    name is invalid or out of order, or bytes are missing."""
    neighbours: dict[str, Advertisement] = {}
    start, former_name = 0, ""
    while start < len(raw):
        name_end = start + 1 + raw[start]
        name = check_device(raw[start + 1 : name_end].decode("latin-1"), "neighbour in a roster")
        # In order, no name comes twice, and both sides mean the same board by a bit.
        if name <= former_name:
            raise ProtocolError("neighbours in a roster", expected="names in order", got=value_text(name))
        neighbours[name] = Advertisement.from_bytes(raw[name_end : name_end + ADVERTISEMENT_BYTES])
        start, former_name = name_end + ADVERTISEMENT_BYTES, name
        # The sender must not decide how many keys are read.
        if len(neighbours) > session.degree:
            break
    if not session.threshold <= len(neighbours) <= session.degree:
        expected = f"from {session.threshold} to {session.degree}"
        raise ProtocolError("neighbours in a roster", expected=expected, got=len(neighbours))
    return neighbours


def encode_bits(names: Sequence[str], among: Iterable[str]) -> bytes:
    marked = frozenset(among)
    bits = sum(1 << i for i, name in enumerate(names) if name in marked)
    return bits.to_bytes(_bitmap_bytes(len(names)), "little")


def decode_bits(raw: bytes, names: Sequence[str], session: SecureSumSession, what: str) -> tuple[str, ...]:
    """The marked ones of some names; `what` describes them. Raises `ProtocolError` for another length or spare bits,
    or if they are fewer than the session's threshold."""
    bits = int.from_bytes(raw, "little")
    if len(raw) != _bitmap_bytes(len(names)) or bits >> len(names):
        raise ProtocolError(f"bits of {what}", expected=f"{len(names)} bits", got=f"{len(raw)} bytes")
    marked = tuple(name for i, name in enumerate(names) if bits >> i & 1)
    if len(marked) < session.threshold:
        raise ProtocolError(
            what,
            expected=f"{session.threshold} or more",
            got=len(marked),
            hint="A sum of fewer updates would tell too much of each.",
        )
    return marked


def encode_delivery(names: Sequence[str], sealed: Mapping[str, bytes]) -> bytes:
    return encode_bits(names, sealed) + b"".join(sealed[name] for name in names if name in sealed)


def decode_delivery(raw: bytes, names: Sequence[str], session: SecureSumSession) -> dict[str, bytes]:
    """The sealed shares by the neighbour that sent them. Raises as `decode_bits`, and for another length."""
    edge = _bitmap_bytes(len(names))
    senders = decode_bits(raw[:edge], names, session, "neighbours that have shared")
    return dict(zip(senders, split_bytes(raw[edge:], SEALED_BYTES, len(senders), "sealed shares"), strict=True))


def decode_unmasking(raw: bytes, owners: Sequence[str]) -> dict[str, bytes]:
    """Shares by the board whose secret they are of: `owners` are the sender's neighbours that had shared, in order.
    Raises `ProtocolError` for another length, or if one is no share."""
    shares = split_bytes(raw, SHARE_BYTES, len(owners), "shares")
    for share in shares:
        check_share(share)
    return dict(zip(owners, shares, strict=True))


def split_bytes(raw: bytes, size: int, count: int, what: str) -> list[bytes]:
    """Bytes in parts of equal size. Raises `ProtocolError`, which names `what`, for another length."""
    if len(raw) != size * count:
        raise ProtocolError(f"bytes of {what}", expected=size * count, got=len(raw))
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def _bitmap_bytes(count: int) -> int:
    return -(-count // 8)
