"""The blobs of a simulation, which only its own processes write and read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore


class ScratchStore(BlobStore):
    """A blob store that trusts what it wrote.

    Blobs of an earlier run are verified when read; those of this run aren't, nor in its helper processes, and files
    aren't flushed to disk. `put` hashes a blob once, and not its leaves of 32 KiB, too: nothing is sent in leaves, so
    the reference may be that of a blob of one leaf.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root.resolve(), durable=False)  # a helper may be started in another folder
        self._earlier = frozenset(self.names())

    def put(self, data: bytes | memoryview) -> BlobRef:
        digest = hashlib.sha256(data)
        ref = BlobRef(digest.hexdigest(), len(data), hashlib.sha256(digest.digest()).hexdigest())
        if not self._is_complete(ref):
            self.check_room(ref.size)
            self.write_file(self.path(ref.sha256), data)
        return ref

    def _check_digest(self, sha256: str, data: bytes | memoryview) -> None:
        if sha256 in self._earlier:
            super()._check_digest(sha256, data)
