"""The blobs of an offer on their way to the device. No network I/O: it returns requests."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from contextlib import suppress

from fedprune.blobs.blob_ref import BlobRef, digests
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.wire.chunk import Chunk, ChunkLimit
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.transfer import Pull, ResponseTime

_LOG = logging.getLogger("fedprune.device")


def reuse_leaves(store: BlobStore, partial: PartialBlob) -> int:
    """Copy leaves that a blob lacks from stored blobs, instead of requesting them; returns their number.

    The next round's weights with frozen tensors differ from the last round's in a part only, and where both files have
    the same layout their leaves are equal. When a blob's leaf table comes, the tables of the stored blobs, 32 bytes for
    every 32 KiB, are searched for what it lacks. What is copied is hashed like a leaf from the network, so that a donor
    may be damaged, or deleted meanwhile. Only equal bytes at a leaf's borders are found.
    """
    missing = dict[bytes, list[int]]()
    for index, digest in enumerate(digests(partial.table or b"")):
        if not partial.present[index]:
            missing.setdefault(digest, []).append(index)
    before = partial.count
    for name in store.names() if missing else ():
        for digest, leaf in _leaves(store, name, missing):
            if all(partial.write(index, leaf) for index in missing[digest]):  # all or none: their bytes are the same
                del missing[digest]
        if not missing:
            break
    if count := partial.count - before:
        _LOG.info("%d of %d leaves of blob %s were here", count, partial.ref.leaf_count, partial.ref.sha256[:12])
    return partial.count - before


def _leaves(store: BlobStore, donor: str, missing: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Leaves of a stored blob that are missing elsewhere, with their digests."""
    with suppress(StorageError):  # deleted, or damaged
        for number, digest in enumerate(digests(store.table(donor))):
            if digest in missing:
                yield digest, store.read_leaves(donor, number, 1)


class BlobDownloads:
    """Parallel downloads of what a device lacks for an offer.

    Weights that can be decoded from something shorter are downloaded in that form, unless `plainly`, and whole if the
    server no longer has it; they are decoded where they are used.

    `limit` is the number of leaves that a chunk may hold, `answers` how long the server's answers take. Raises
    `StorageFullError` if there is no room, `ProtocolError` if a reference contradicts itself.
    """

    def __init__(
        self,
        store: BlobStore,
        offer: Offer,
        now: float,
        limit: ChunkLimit | None = None,
        answers: ResponseTime | None = None,
        *,
        plainly: bool = False,
    ) -> None:
        self.offer = offer
        self.began = now
        self._store = store
        self._limit = limit or ChunkLimit()
        self._answers = answers or ResponseTime()
        refs = offer.blobs() if plainly else offer.shorter(store.has)
        self._encoded = offer.coded if offer.coded in refs else None
        self._pulls = {r.sha256: self._pull(r) for r in refs if not store.has(r.sha256)}

    def _pull(self, ref: BlobRef) -> Pull:
        partial = self._store.partial(ref, vouched=True)  # the server has named and signed both of its digests
        lend = functools.partial(reuse_leaves, self._store)
        return Pull(ref, partial, limit=self._limit, answers=self._answers, lend=lend)

    @property
    def done(self) -> bool:
        return all(p.done for p in self._pulls.values())

    @property
    def lacking(self) -> tuple[BlobRef, ...]:
        return tuple(p.ref for p in self._pulls.values() if not p.done)

    @property
    def progress(self) -> tuple[int, int]:
        rows = [p.progress for p in self._pulls.values()]
        return sum(done for done, _ in rows), sum(total for _, total in rows)

    def start(self, now: float) -> list[BlobRequest]:
        return [want for p in self._pulls.values() if not p.done for want in p.start(now)]

    def remind(self, now: float) -> list[BlobRequest]:
        """Requests to repeat when a server, perhaps a new one, announces itself on this connection."""
        return [want for p in self._pulls.values() if not p.done for want in p.remind(now)]

    def chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Record a chunk and return further requests; raises `ProtocolError` if this server can't send the blob."""
        pull = self._pulls.get(chunk.sha256)
        return [] if pull is None or pull.done else pull.on_chunk(chunk, now)

    def tick(self, now: float) -> list[BlobRequest]:
        return [want for p in self._pulls.values() if not p.done for want in p.on_tick(now)]

    def gone(self, sha256: str, now: float) -> list[BlobRequest]:
        """Note that the server lacks a blob: of encoded weights the plain ones are requested, else `ProtocolError` is
        raised."""
        pull = self._pulls.get(sha256)
        if pull is None or pull.done:
            return []
        if pull.ref != self._encoded:
            raise ProtocolError(f"the server no longer has blob {sha256[:12]}")
        del self._pulls[sha256]
        weights = self._pulls[self.offer.weights.sha256] = self._pull(self.offer.weights)
        return weights.start(now)
