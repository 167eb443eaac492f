"""Leaves that a blob shares with blobs that are here: they are copied instead of being asked for.

Next round's weights with frozen tensors are the last round's but for a part, and where both files have the same layout
their leaves are equal. Nothing is kept for that: as a blob's leaf table comes, the tables of the blobs that are here,
32 bytes for every 32 KiB, are looked through for what it lacks. What is copied is hashed like a leaf from the network,
so a donor may be damaged, or deleted meanwhile.

Found are leaves of the same bytes at whatever numbers, but not what lies otherwise to the leaves' borders.
"""

from __future__ import annotations

import logging

from fedprune.blobs.blob_ref import DIGEST
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import StorageError

_LOG = logging.getLogger("fedprune.device")


class LeafReuse:
    """Finds leaves in a store.

    Args:
        store: Where the donors are.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def lend(self, partial: PartialBlob) -> int:
        """Copy what a blob that is to arrive lacks and another one has.

        Args:
            partial: The blob, which has its leaf table.

        Returns:
            How many leaves were copied.

        Raises:
            StorageError: The disk is full, or can't be written.
        """
        table, missing = partial.table or b"", dict[bytes, list[int]]()
        for index, present in enumerate(partial.present):
            if not present:
                missing.setdefault(table[index * DIGEST : (index + 1) * DIGEST], []).append(index)
        before = partial.count
        for name in self._store.names() if missing else ():
            self._from(name, partial, missing)
            if not missing:
                break
        if count := partial.count - before:
            _LOG.info("%d of %d leaves of blob %s were here", count, partial.ref.leaf_count, partial.ref.sha256[:12])
        return partial.count - before

    def _from(self, donor: str, partial: PartialBlob, missing: dict[bytes, list[int]]) -> None:
        """Copy from one blob; what was copied is missing no more."""
        try:
            table = self._store.table(donor)
        except StorageError:
            return  # deleted, or damaged
        for number in range(len(table) // DIGEST):
            digest = table[number * DIGEST : (number + 1) * DIGEST]
            indices = missing.get(digest)
            if indices is None:
                continue
            try:
                leaf = self._store.read_leaves(donor, number, 1)
            except StorageError:
                return
            if all(partial.write(index, leaf) for index in indices):  # all or none: their bytes are the same
                del missing[digest]
