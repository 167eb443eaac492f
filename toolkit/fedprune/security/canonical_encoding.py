"""Bytes to be signed or authenticated: several values as one text that can be read in one way only."""

from __future__ import annotations

import struct


def transcript(domain: str, *parts: str | bytes | int | None) -> bytes:
    """Values one after the other, each with its kind and length.

    Args:
        domain: What the text is for; texts of two domains never are the same.
        parts: The values. Two lists of them that differ give texts that differ.
    """
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
