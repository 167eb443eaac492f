"""The sending side of a transfer of blobs: answers requests with chunks, and keeps no state.

`wire.transfer` has the receiving side, which drives the transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import StorageError
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, Chunk, leaves_per_chunk, read_chunks
from fedprune.wire.messages import MAX_REQUEST, BlobNotFound, BlobRequest


class BlobSender:
    """The stateless sender of blobs: it answers requests from the first of its stores that has the blob."""

    def __init__(self, *stores: BlobStore) -> None:
        self._stores = stores

    def leaf_count(self, sha256: str) -> int:
        """The number of leaves of a blob; 0 if no store has it."""
        store = next((s for s in self._stores if s.has(sha256)), None)
        try:
            return 0 if store is None else -(-store.size(sha256) // LEAF_BYTES)
        except StorageError:
            return 0

    def answer(self, request: BlobRequest, max_packet: int = DEFAULT_MAX_PACKET) -> Iterator[bytes] | BlobNotFound:
        """The requested chunks, as far as the blob goes, read while they are consumed; `BlobNotFound` if no store has
        it.

        Raises `ProtocolError` if not even one leaf fits into an MQTT packet of `max_packet` bytes.
        """
        step = min(leaves_per_chunk(max_packet), request.most or MAX_REQUEST)
        store = next((s for s in self._stores if s.has(request.sha256)), None)
        if store is None:
            return BlobNotFound(request.sha256)
        if request.part == "leaves":
            try:
                return _table_chunks(request, store.table(request.sha256), step)
            except StorageError:
                if store.has(request.sha256):
                    raise
                return BlobNotFound(request.sha256)  # deleted meanwhile
        return _data_chunks(store, request, step)


def _data_chunks(store: BlobStore, request: BlobRequest, step: int) -> Iterator[bytes]:
    # Chunks of equal size, instead of full ones and a small last one: each message costs the broker the same.
    step = -(-request.count // -(-request.count // step))
    # A blob that was deleted meanwhile ends the chunks; the next request gets `BlobNotFound`.
    with suppress(StorageError, OSError), store.open(request.sha256) as file:
        yield from read_chunks(file, request.sha256, request.first, request.count, step)


def _table_chunks(request: BlobRequest, table: bytes, step: int) -> Iterator[bytes]:
    end = request.first + request.count
    for first in range(request.first, end, step):
        payload = table[first * LEAF_BYTES : min(first + step, end) * LEAF_BYTES]
        if not payload:
            return
        yield Chunk(request.sha256, "leaves", first, payload).to_bytes()
