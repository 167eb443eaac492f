"""The blobs of a simulation, which its own processes alone write and read."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore


class ScratchStore(BlobStore):
    """A store that hashes each blob once.

    Files aren't flushed. One that was written since the store was opened isn't verified, neither here nor in the helper
    processes that are given this store; what an earlier run left is. No blob travels, so references name a leaf table
    of one leaf, the whole blob; `table` makes the real one.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root.resolve(), durable=False)  # a helper may be started in another folder
        self._opened = time.time_ns()

    def put(self, data: bytes | memoryview) -> BlobRef:
        digest = hashlib.sha256(data)
        ref = BlobRef(digest.hexdigest(), len(data), hashlib.sha256(digest.digest()).hexdigest())
        if not self._whole(ref):
            self.check_room(ref.size)
            self.write_file(self.path(ref.sha256), data)
        return ref

    def _expect(self, sha256: str, data: bytes | memoryview) -> None:
        if self.path(sha256).stat().st_mtime_ns <= self._opened:
            super()._expect(sha256, data)
