"""The blobs of an offer on their way to the device. Does no network I/O: it says what to ask for."""

from __future__ import annotations

from fedprune.blobs import BlobStore
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import Offer, Want
from fedprune.wire.transfer import Pull


class Downloads:
    """Parallel pulls of what a device lacks for an offer.

    Args:
        store: Where the blobs end up; what is there of them already is not asked for again.
        offer: The offer.
        now: The time, on the same clock as later calls.
        plainly: Whether weights are pulled as they are, though they could be decoded.

    Raises:
        StorageFullError: There is no room for them.
        StorageError: The disk fails.
        ProtocolError: A reference contradicts itself.
    """

    def __init__(self, store: BlobStore, offer: Offer, now: float, plainly: bool = False) -> None:
        wanted = offer.blobs() if plainly else offer.shorter(store.has)
        refs: dict[str, BlobRef] = {r.sha256: r for r in wanted}
        self.offer = offer
        self.began = now
        self._pulls = {sha256: Pull(ref, store.partial(ref)) for sha256, ref in refs.items() if not store.has(sha256)}

    @property
    def done(self) -> bool:
        """Whether everything is there."""
        return all(p.done for p in self._pulls.values())

    @property
    def progress(self) -> tuple[int, int]:
        """Leaves that are there, and leaves in all, of the blobs that were lacking."""
        rows = [p.progress for p in self._pulls.values()]
        return sum(done for done, _ in rows), sum(total for _, total in rows)

    def start(self, now: float) -> list[Want]:
        """What to ask for on a new connection."""
        return [want for p in self._pulls.values() if not p.done for want in p.start(now)]

    def chunk(self, chunk: Chunk, now: float) -> list[Want]:
        """Take in a chunk; those of other blobs are ignored.

        Raises:
            ProtocolError: The blob can't be had from this server.
            StorageError: The disk fails or is full.
        """
        pull = self._pulls.get(chunk.sha256)
        return pull.on_chunk(chunk, now) if pull is not None and not pull.done else []

    def tick(self, now: float) -> list[Want]:
        """What to ask for again."""
        return [want for p in self._pulls.values() if not p.done for want in p.on_tick(now)]

    def lacks(self, sha256: str) -> bool:
        """Whether this blob is still to come."""
        return sha256 in self._pulls and not self._pulls[sha256].done
