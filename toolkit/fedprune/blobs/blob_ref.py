"""References to blobs: what a blob is called, how long it is, and what its pieces hash to.

A blob is named by the sha256 of its bytes. It is hashed a second time in *leaves* of 32 KiB, so that each piece can be
verified on arrival; the digests of all leaves, one after the other, are its *leaf table*, and the reference holds the
sha256 of that table.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from fedprune.core.errors import ProtocolError
from fedprune.core.records import Digest, convert, within

# Bytes of a leaf; the last one of a blob may be shorter.
LEAF = 32 * 1024

# Bytes of a leaf's digest in the leaf table.
DIGEST = 32

# The suffix of a leaf table's file after its blob's name.
SUFFIX = ".leaves"

# Size that no reference may exceed; a store's own limit is usually far lower.
MAX_BLOB = 2**40


@dataclass(frozen=True)
class BlobRef:
    """A blob's name (the hex sha256 of all bytes), size, and the sha256 of its leaf table."""

    sha256: Digest
    size: Annotated[int, within(0, MAX_BLOB)]
    leaves: Digest

    @classmethod
    def of(cls, data: bytes | memoryview) -> BlobRef:
        table = leaf_table(data)
        return cls(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(table).hexdigest())

    @property
    def leaf_count(self) -> int:
        """Number of leaves; an empty blob has none."""
        return -(-self.size // LEAF)

    @property
    def piece_count(self) -> int:
        """Number of pieces of at most 32 KiB in which the leaf table travels."""
        return -(-self.leaf_count * DIGEST // LEAF)

    def leaf_size(self, index: int) -> int:
        return min(LEAF, self.size - index * LEAF)

    def to_dict(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size, "leaves": self.leaves}

    @classmethod
    def from_dict(cls, body: object) -> BlobRef:
        """Read and check; unknown keys are ignored. Raises `ProtocolError`."""
        return convert(cls, body, "blob reference", ProtocolError)


def table_file(table: bytes) -> bytes:
    """The file of a leaf table: its sha256, then the table.

    It is never flushed: what a power cut leaves is recognised by the digest, and the table is made or pulled again.
    """
    return hashlib.sha256(table).digest() + table


def read_table_file(raw: bytes, leaf_count: int) -> bytes | None:
    """The leaf table in a file's bytes; None where they are no such table, or damaged."""
    digest, table = raw[:DIGEST], raw[DIGEST:]
    return table if len(table) == leaf_count * DIGEST and hashlib.sha256(table).digest() == digest else None


def leaf_table(data: bytes | memoryview) -> bytes:
    """Digests of the leaves of `data`, one after the other."""
    view = memoryview(data)
    return b"".join(hashlib.sha256(view[at : at + LEAF]).digest() for at in range(0, len(view), LEAF))


def digests(table: bytes) -> list[bytes]:
    """The digests of a leaf table."""
    return [table[at : at + DIGEST] for at in range(0, len(table), DIGEST)]
