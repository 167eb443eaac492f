"""A blob that arrives from its first byte to its last, as over HTTP."""

from __future__ import annotations

import hashlib
import os

from fedprune.blobs.blob_ref import LEAF_BYTES, TABLE_SUFFIX, BlobRef, table_file
from fedprune.blobs.partial_blob import BlobFolder
from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import ProtocolError


class StreamedBlob:
    """A blob on its way into a store, as a context manager. Nothing of it stays unless `finish` has verified it.

    Args:
        ref: Named by the sender, so that all of it is verified.
        cached: Whether the folder is a cache. Then the file isn't flushed, and its leaf table isn't kept: it is
            computed when somebody asks for it.

    Raises `StorageError` if the disk fails, and `StorageFullError` if it is full, or no blob may be that large.
    """

    def __init__(self, store: BlobFolder, ref: BlobRef, *, cached: bool = False) -> None:
        store.check_room(ref.size)
        self.ref = ref
        self._is_cached = cached
        self.received_bytes = 0  # bytes that have arrived
        self._store = store
        self._hasher, self._leaf_hasher = hashlib.sha256(), hashlib.sha256()
        self._table = bytearray()
        self._path = store.temporary_path()
        with storage_errors(f"can't write {self._path}"):
            self._descriptor: int | None = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def __enter__(self) -> StreamedBlob:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._path.unlink(missing_ok=True)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to come."""
        return self.ref.size - self.received_bytes

    def write(self, data: bytes) -> None:
        """Append the next bytes. Raises `ProtocolError` if they are more than are missing, and `StorageError` if the
        disk fails."""
        if self._descriptor is None or len(data) > self.missing_bytes:
            raise ProtocolError("bytes of a blob", expected=f"at most {self.missing_bytes} more", got=len(data))
        with storage_errors(f"can't write {self._path}"):
            write_all(self._descriptor, data, self.received_bytes)
        self._hasher.update(data)
        view = memoryview(data)
        while view:
            chunk = view[: LEAF_BYTES - self.received_bytes % LEAF_BYTES]
            self._leaf_hasher.update(chunk)
            self.received_bytes += len(chunk)
            view = view[len(chunk) :]
            if self.received_bytes % LEAF_BYTES == 0 or not self.missing_bytes:
                self._table += self._leaf_hasher.digest()
                self._leaf_hasher = hashlib.sha256()

    def finish(self) -> None:
        """Verify the blob and give it its name. Raises `ProtocolError` if it is not what the reference names, and
        `StorageError` if the disk fails."""
        table, digest = bytes(self._table), self._hasher.hexdigest()
        is_genuine = digest == self.ref.sha256 and hashlib.sha256(table).hexdigest() == self.ref.leaves
        if self._descriptor is None or not is_genuine:
            raise ProtocolError("what was sent is not the blob", expected=self.ref.sha256, got=digest)
        target = self._store.path(self.ref.sha256)
        with storage_errors(f"can't write {target}"):
            if self._store.durable and not self._is_cached:
                os.fsync(self._descriptor)
            self._close()
            # The table before the blob: from the moment that the blob has its name others may ask for its leaves.
            if self.ref.leaf_count > 1 and not self._is_cached:
                self._store.write_file(target.with_name(target.name + TABLE_SUFFIX), table_file(table), flush=False)
            self._store.move(self._path, target, flush=not self._is_cached)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
