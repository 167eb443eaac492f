"""Unambiguous encoding of several values as bytes to be signed or authenticated."""

from __future__ import annotations

import struct


def transcript(domain: str, *parts: str | bytes | int | None) -> bytes:
    """The values, each with its kind and length, after a domain that separates purposes: different values give
    different bytes."""
    rows = [domain.encode() + b"\0"]
    for part in parts:
        if part is None:
            kind, raw = b"-", b""
        elif isinstance(part, bytes):
            kind, raw = b"b", part
        elif isinstance(part, int):
            kind, raw = b"n", str(part).encode()
        else:
            kind, raw = b"t", part.encode()
        rows.append(kind + struct.pack("<I", len(raw)) + raw)
    return b"".join(rows)
