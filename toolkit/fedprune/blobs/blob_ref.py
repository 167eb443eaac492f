"""References to blobs: name, size and leaf hashes.

A blob is named by the sha256 of its bytes. It is hashed a second time in *leaves* of 32 KiB, so that each piece can be
verified on arrival; the digests of all leaves, one after the other, are its *leaf table*, and the reference holds the
sha256 of that table.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Any

from fedprune.core.errors import ProtocolError
from fedprune.core.records import Digest, convert_record, number_range

# Bytes of a leaf; the last one of a blob may be shorter. A leaf fits into a message of every broker, hosted ones
# included, so that chunks are whole leaves and are verified on arrival.
LEAF_BYTES = 32 * 1024

# Bytes of a leaf's digest in the leaf table.
DIGEST_BYTES = 32

# The suffix of a leaf table's file after its blob's name.
TABLE_SUFFIX = ".leaves"

# Size that no reference may exceed; a store's own limit is usually far lower.
MAX_BLOB_BYTES = 2**40


@dataclass(frozen=True)
class BlobRef:
    """A blob's name (the hex sha256 of all bytes), size, and the sha256 of its leaf table."""

    sha256: Digest
    size: Annotated[int, number_range(0, MAX_BLOB_BYTES)]
    leaves: Digest

    @classmethod
    def of(cls, data: bytes | memoryview) -> BlobRef:
        return cls(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(leaf_table(data)).hexdigest())

    @property
    def leaf_count(self) -> int:
        """Number of leaves; an empty blob has none."""
        return -(-self.size // LEAF_BYTES)

    @property
    def piece_count(self) -> int:
        """Number of pieces of at most 32 KiB in which the leaf table travels."""
        return -(-self.leaf_count * DIGEST_BYTES // LEAF_BYTES)

    def leaf_size(self, index: int) -> int:
        return min(LEAF_BYTES, self.size - index * LEAF_BYTES)

    def to_dict(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": self.size, "leaves": self.leaves}

    @classmethod
    def from_dict(cls, body: object) -> BlobRef:
        """Read and check; unknown keys are ignored. Raises `ProtocolError`."""
        return convert_record(cls, body, "blob reference", ProtocolError)


def table_file(table: bytes) -> bytes:
    """The file of a leaf table: its sha256, then the table.

    The file is never flushed: its digest reveals what a power cut left, and the table is computed or pulled again.
    """
    return hashlib.sha256(table).digest() + table


def read_table_file(raw: bytes, leaf_count: int) -> bytes | None:
    """The leaf table in the bytes of a `table_file`; None if they are damaged or of another length."""
    digest, table = raw[:DIGEST_BYTES], raw[DIGEST_BYTES:]
    return table if len(table) == leaf_count * DIGEST_BYTES and hashlib.sha256(table).digest() == digest else None


def leaf_table(data: bytes | memoryview) -> bytes:
    """Digests of the leaves of `data`, one after the other."""
    view = memoryview(data)
    return b"".join(hashlib.sha256(view[i : i + LEAF_BYTES]).digest() for i in range(0, len(view), LEAF_BYTES))


def leaf_digests(table: bytes) -> list[bytes]:
    """The digests of a leaf table."""
    return [table[start : start + DIGEST_BYTES] for start in range(0, len(table), DIGEST_BYTES)]
