"""Leaf tables as they lie on a disk: each with its own digest in front, because no disk is waited for.

A table can be made again from its blob, or pulled again. So none is flushed, and whatever a power cut leaves of one
(nothing, half of it, zeros) is found out by its digest and not used.
"""

from __future__ import annotations

import hashlib

from fedprune.blobs.blob_ref import DIGEST

SUFFIX = ".leaves"
"""What a leaf table's file name ends with, beside its blob's."""


def kept(table: bytes) -> bytes:
    """The file of a leaf table: its sha256, 32 bytes, and the table."""
    return hashlib.sha256(table).digest() + table


def unkept(raw: bytes, leaf_count: int) -> bytes | None:
    """The leaf table in a file's bytes; None where the file is none, or damaged.

    Args:
        raw: What the file holds.
        leaf_count: Leaves of its blob.
    """
    digest, table = raw[:DIGEST], raw[DIGEST:]
    return table if len(table) == leaf_count * DIGEST and hashlib.sha256(table).digest() == digest else None
