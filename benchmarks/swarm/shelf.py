"""What a process of the swarm has fetched. Every device fetches and checks for itself, but the bytes are kept once."""

from __future__ import annotations

import hashlib

from fedprune.blobs.blob_ref import DIGEST_BYTES, LEAF_BYTES, BlobRef


class Shelf(dict[str, bytes]):
    """Blobs of one process by digest."""

    def __init__(self) -> None:
        self._claimed: set[str] = set()

    def claim(self, sha256: str) -> bool:
        """Whether nobody of this process has fetched a blob yet, or is about to; then the caller is."""
        fresh = sha256 not in self._claimed
        self._claimed.add(sha256)
        return fresh


class Arriving:
    """A blob on its way to one device, as `fedprune.wire.transfer.Pull` sees it: checked leaf by leaf.

    Leaves are held until the blob is whole only where the shelf hasn't got it.
    """

    __slots__ = ("_leaves", "_shelf", "is_complete", "present_count", "present_leaves", "ref", "table")

    def __init__(self, shelf: Shelf, ref: BlobRef) -> None:
        self._shelf, self.ref = shelf, ref
        self.table: bytes | None = bytes.fromhex(ref.sha256) if ref.leaf_count == 1 else None
        self.present_leaves = bytearray(ref.leaf_count)
        self.present_count = 0
        self.is_complete = False
        self._leaves: dict[int, bytes] = {}

    def set_table(self, table: bytes) -> bool:
        """Keep the leaf table, if it is the one that the reference names."""
        if hashlib.sha256(table).hexdigest() != self.ref.leaves:
            return False
        self.table = table
        return True

    def write_leaves(self, first: int, payload: bytes | memoryview) -> list[int]:
        """Take in those of some consecutive leaves that are what the table says; the indices of the others."""
        assert self.table is not None
        wrong, view = [], memoryview(payload)
        for index in range(first, first + max(1, -(-len(view) // LEAF_BYTES))):
            leaf = view[(index - first) * LEAF_BYTES : (index - first + 1) * LEAF_BYTES]
            if hashlib.sha256(leaf).digest() != self.table[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
                wrong.append(index)
            elif not self.present_leaves[index]:
                self.present_leaves[index] = 1
                self.present_count += 1
                if self.ref.sha256 not in self._shelf:
                    self._leaves[index] = bytes(leaf)
        return wrong

    def finish(self) -> None:
        """Put the blob on the shelf, unless it is there."""
        if self.ref.sha256 not in self._shelf:
            raw = b"".join(self._leaves[i] for i in range(self.ref.leaf_count))
            assert hashlib.sha256(raw).hexdigest() == self.ref.sha256
            self._shelf[self.ref.sha256] = raw
        self._leaves.clear()
        self.is_complete = True
