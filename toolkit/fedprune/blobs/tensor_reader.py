"""Read some tensors of a stored blob without reading or hashing the rest.

Each leaf of a blob has a digest of its own (`fedprune.blobs.blob_ref`), so that only the leaves with the requested
tensors are verified.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Collection

from fedprune.blobs.blob_ref import DIGEST_BYTES, LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.tensorfile import Array, array_at, header_length, tensor_offsets


def read_tensors(store: BlobStore, ref: BlobRef, names: Collection[str] | None = None) -> dict[str, Array]:
    """Verified tensors of a stored file, as read-only views on it: those of these names that it has, by default all.

    Raises `StorageError` if the blob isn't here, or what was read of it is damaged, and `BundleError` if it isn't a
    tensor file.
    """
    view = _map_blob(store, ref)
    view.verify(0, 8)  # the header's length, which tells how much of the file the header takes
    view.verify(0, 8 + header_length(view.bytes))
    tensors = {}
    for name, (code, shape, start, end) in tensor_offsets(view.bytes).items():
        if names is None or name in names:
            view.verify(start, end)
            tensors[name] = array_at(view.bytes, code, shape, start, end)
    return tensors


class _VerifiedBytes:
    """A blob's bytes, each leaf of which is verified once, when it is first needed."""

    def __init__(self, data: memoryview, table: bytes, path: str) -> None:
        self.bytes = data
        self._table = table
        self._path = path
        self._verified_leaves: set[int] = set()

    def verify(self, start: int, end: int) -> None:
        """Raise `StorageError` if the leaves of these bytes don't match the table."""
        for leaf in range(start // LEAF_BYTES, -(-min(end, len(self.bytes)) // LEAF_BYTES)):
            if leaf in self._verified_leaves:
                continue
            digest = hashlib.sha256(self.bytes[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES]).digest()
            if digest != self._table[leaf * DIGEST_BYTES : (leaf + 1) * DIGEST_BYTES]:
                raise StorageError(f"blob {self._path} is damaged in leaf {leaf}")
            self._verified_leaves.add(leaf)


def _map_blob(store: BlobStore, ref: BlobRef) -> _VerifiedBytes:
    """Map a blob's file, with the leaf table that its reference names."""
    path, table = store.path(ref.sha256), store.table(ref.sha256)
    with storage_errors(f"can't read {path}"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")
    if size != ref.size or hashlib.sha256(table).hexdigest() != ref.leaves:
        raise StorageError(f"blob {path} is damaged, or its leaf table is", expected=f"{ref.size} bytes", got=size)
    return _VerifiedBytes(view, table, str(path))
