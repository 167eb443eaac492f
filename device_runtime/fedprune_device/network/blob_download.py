"""The blobs of an offer on their way to the device. No network I/O: it returns requests, and topics to listen to."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from fedprune.blobs.blob_ref import BlobRef, digests
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ProtocolError, StorageError
from fedprune.updates.width_deltas import compose
from fedprune.wire.chunk import Chunk, ChunkLimit
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import PATIENCE, Pull, ResponseTime

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


_SHARED_LEAVES = 8  # leaves of a shared blob per request: many boards request them, and one answer serves all


class BlobDownloads:
    """Parallel downloads of what a device lacks for an offer.

    Other devices download an offer's slabs, too: this device then listens on the shared topics, takes what the others
    requested, and makes its weights of the slabs. If anything fails, it downloads its weights whole, on its own topic.
    Weights that can be decoded from something shorter are downloaded in that form first, unless `plainly`; they are
    decoded where they are used.

    `limit` is the number of leaves that a chunk may hold, `answers` how long the server's answers take. `deaf`: nothing
    came on a shared topic in time. Raises `StorageFullError` if there is no room, `ProtocolError` if a reference
    contradicts itself.
    """

    def __init__(
        self,
        store: BlobStore,
        offer: Offer,
        now: float,
        limit: ChunkLimit | None = None,
        answers: ResponseTime | None = None,
        *,
        slabs: bool = True,
        shared: bool = True,
        plainly: bool = False,
    ) -> None:
        self.offer = offer
        self.began = now
        self.deaf = False
        self._store = store
        self._limit = limit or ChunkLimit()
        self._answers = answers or ResponseTime()
        lacking = not store.has(offer.weights.sha256)
        coded = offer.coded is not None and not plainly and offer.coded in offer.shorter(store.has)
        self._coded: tuple[BlobRef, ...] = (offer.coded,) if coded and offer.coded else ()
        self._slabs = offer.slabs if slabs and offer.slabs and lacking and not self._coded else ()
        self._shared = shared and bool(offer.slabs)
        self._heard = False
        self._listens_since = now
        refs: dict[str, BlobRef] = {r.sha256: r for r in (*offer.blobs(), *self._instead)}
        if self._instead and offer.weights not in self._instead:
            del refs[offer.weights.sha256]
        self._pulls = {sha256: self._pull(ref) for sha256, ref in refs.items() if not store.has(sha256)}

    def _pull(self, ref: BlobRef) -> Pull:
        slabs = self.offer.slabs or ()
        own = ref in (self.offer.weights, self.offer.coded, self.offer.moved) and ref not in slabs
        partial = self._store.partial(ref, vouched=True)  # the server has named and signed both of its digests
        lend = functools.partial(reuse_leaves, self._store)
        if own or not self._shared:
            return Pull(ref, partial, limit=self._limit, answers=self._answers, lend=lend)
        return Pull(
            ref, partial, chunk_leaves=_SHARED_LEAVES, limit=self._limit, shared=True, answers=self._answers, lend=lend
        )

    @property
    def _instead(self) -> tuple[BlobRef, ...]:
        """The parts of the weights, unless they are pulled whole."""
        return self._coded or self._slabs

    @property
    def done(self) -> bool:
        return not self._slabs and all(p.done for p in self._pulls.values())

    @property
    def lacking(self) -> tuple[BlobRef, ...]:
        return tuple(p.ref for p in self._pulls.values() if not p.done)

    @property
    def progress(self) -> tuple[int, int]:
        rows = [p.progress for p in self._pulls.values()]
        return sum(done for done, _ in rows), sum(total for _, total in rows)

    def listens(self, topics: Topics) -> frozenset[str]:
        """The shared topics of what is still to come."""
        job = self.offer.job
        return frozenset(topics.shared(s, job) for s, p in self._pulls.items() if p.shared and not p.done)

    def start(self, now: float) -> list[BlobRequest]:
        self._listens_since = now
        return [want for p in self._pulls.values() if not p.done for want in p.start(now)] + self._settle(now)

    def remind(self, now: float) -> list[BlobRequest]:
        """Requests to repeat when a server, perhaps a new one, announces itself on this connection."""
        return [want for p in self._pulls.values() if not p.done for want in p.remind(now)]

    def chunk(self, chunk: Chunk, now: float, *, shared: bool = False) -> list[BlobRequest]:
        """Record a chunk and return further requests; raises `ProtocolError` if this server can't send the blob."""
        pull = self._pulls.get(chunk.sha256)
        if pull is None or pull.done:
            return []
        self._heard = self._heard or shared
        return pull.on_chunk(chunk, now) + self._settle(now)

    def tick(self, now: float) -> list[BlobRequest]:
        awaits = self._shared and any(p.shared and not p.done for p in self._pulls.values())
        if awaits and not self._heard and now - self._listens_since > self._answers.patience(PATIENCE):
            # A broker whose rules are older than shared topics lets nothing through there, and reports no error.
            self._shared, self.deaf = False, True
            for pull in self._pulls.values():
                pull.shared = False
        return [want for p in self._pulls.values() if not p.done for want in p.on_tick(now)] + self._settle(now)

    def gone(self, sha256: str, now: float) -> list[BlobRequest]:
        """Note that the server lacks a blob, which other ways may replace; else raises `ProtocolError`."""
        pull = self._pulls.get(sha256)
        if pull is None or pull.done:
            return []
        if any(r.sha256 == sha256 for r in self._instead) and sha256 != self.offer.weights.sha256:
            return self._whole(now)
        raise ProtocolError(f"the server no longer has blob {sha256[:12]}")

    def _settle(self, now: float) -> list[BlobRequest]:
        """Make the weights, once all slabs are there."""
        if not self._slabs or any(not p.done for s, p in self._pulls.items() if s in {r.sha256 for r in self._slabs}):
            return []
        weights = self.offer.weights.sha256
        if self._slabs[-1].sha256 != weights:
            try:
                made = composed(self._store, self._slabs)
                if tensorfile.digest(made) != weights:
                    raise BundleError("slabs make other weights than the offer names")
                self._store.put(made)
            except (BundleError, StorageError) as error:
                _LOG.warning("%s: pulling the weights whole", error)
                return self._whole(now)
        self._slabs = ()
        return []

    def _whole(self, now: float) -> list[BlobRequest]:
        pull = self._pull(self.offer.weights)
        for ref in self._instead:
            self._pulls.pop(ref.sha256, None)
        self._coded = self._slabs = ()
        self._pulls[self.offer.weights.sha256] = pull
        return pull.start(now)


def composed(store: BlobStore, slabs: Sequence[BlobRef]) -> bytes:
    """The tensor file that slabs, in ascending order, make; raises `BundleError` if they don't fit each other."""
    tensors = tensorfile.decode(store.read(slabs[0].sha256))
    for ref in slabs[1:]:
        tensors = compose(tensors, tensorfile.decode(store.read(ref.sha256)))
    return tensorfile.encode(tensors)
