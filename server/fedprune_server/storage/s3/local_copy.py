"""Blobs that nobody has to wait for: of a bucket's, those of which the folder has a copy."""

from __future__ import annotations

from fedprune.blobs.blob_store import BlobStore
from fedprune_server.storage.s3.store import BucketStore


class LocalCopy(BlobStore):
    """What of a bucket's blobs lies in the folder: whoever may not wait for the bucket looks here.

    Args:
        store: The store.
    """

    def __init__(self, store: BucketStore) -> None:
        super().__init__(store.root, max_size=store.max_size, reserve=store.reserve, durable=store.durable)
        self._store = store
        self._checked = store._checked  # what is let go of is forgotten there

    def has(self, sha256: str) -> bool:
        """Whether a blob is in the folder."""
        found = super().has(sha256)
        if found:
            self._store.touch(sha256)
        return found

    def map(self, sha256: str) -> memoryview:
        """A blob's bytes as a view on its file."""
        self._store.touch(sha256)
        return super().map(sha256)

    def size(self, sha256: str) -> int:
        """Bytes of a blob, which may be let go of at any moment."""
        return self._store.known_size(sha256) or super().size(sha256)

    def check_room(self, size: int) -> None:
        """Make room for so many bytes more."""
        self._store.check_room(size)


def near(store: BlobStore) -> BlobStore:
    """The blobs of a store that nobody has to wait for: of a bucket's, those in the folder."""
    return LocalCopy(store) if isinstance(store, BucketStore) else store
