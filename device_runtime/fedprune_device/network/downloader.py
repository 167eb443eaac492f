"""The download of an offer's blobs: from the web server that the offer names, and the rest over MQTT."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import MAX_PACKET, Chunk, ChunkLimit
from fedprune.wire.link import tls_context
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.transfer import Pull
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.connection import Connection
from fedprune_device.network.http_download import HttpFetch
from fedprune_device.network.leaf_reuse import reuse_leaves
from fedprune_device.network.uplink import Uplink


class Downloader:
    """Downloads the blobs of one offer at a time, in parallel. No call waits for the network.

    Weights are downloaded in their shorter encoded form if there is one, and plainly if the server no longer has it.
    They are decoded later, by the round that uses them.

    Attributes:
        offer: What is being downloaded; None if nothing is.
    """

    def __init__(
        self,
        store: BlobStore,
        connection: Connection,
        uplink: Uplink,
        max_packet: int = MAX_PACKET,
        context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self.offer: Offer | None = None
        self._store, self._connection, self._uplink = store, connection, uplink
        self._limit, self._context = ChunkLimit(max_packet), context
        self._web: HttpFetch | None = None
        self._last_web: HttpFetch | None = None
        self._pulls: dict[str, Pull] = {}
        self._began = 0.0
        self._plainly = False

    @property
    def fetching(self) -> bool:
        return self._web is not None

    @property
    def progress(self) -> tuple[int, int]:
        progresses = [self._web.progress] if self._web is not None else [pull.progress for pull in self._pulls.values()]
        return sum(done for done, _ in progresses), sum(total for _, total in progresses)

    def begin(self, offer: Offer, now: float, *, plainly: bool = False, asks: bool = True) -> None:
        """Begin with another offer; `plainly`: without encoded weights; `asks`: the connection is up.

        Raises `StorageFullError` if there is no room, and `ProtocolError` if a reference contradicts itself.
        """
        self._plainly, self._began = plainly, now
        self._prepare(offer)
        self._stop_web()
        missing = tuple(pull.ref for pull in self._pulls.values())
        if offer.blobs_at is not None and missing:
            base = BlobUrl.parse(offer.blobs_at)
            self._web = self._last_web = HttpFetch(self._store, base, missing, self._context)
        elif asks:
            self.connected(now)

    def renumber(self, offer: Offer) -> None:
        """Continue the download for another attempt at the same work."""
        if self.offer is not None:
            self.offer = offer

    def connected(self, now: float) -> None:
        """Request everything that is missing: requests of an earlier connection are lost."""
        self._pull(lambda pull: pull.start(now))

    def remind(self, now: float) -> None:
        """Repeat all requests: the server has announced itself, and may be a new one."""
        self._pull(lambda pull: pull.remind(now))

    def chunk(self, chunk: Chunk, now: float) -> None:
        """Store a chunk. Raises `ProtocolError` if this server can't send the blob."""
        self._pull(lambda pull: pull.on_chunk(chunk, now) if pull.ref.sha256 == chunk.sha256 else [])

    def gone(self, sha256: str, now: float) -> None:
        """Note that the server lacks a blob: of encoded weights the plain ones are requested, else `ProtocolError` is
        raised."""
        pull = self._pulls.get(sha256)
        if self.offer is None or self._web is not None or pull is None or pull.done:
            return
        if pull.ref != self.offer.coded:
            raise ProtocolError(f"the server no longer has blob {sha256[:12]}")
        del self._pulls[sha256]
        weights = self._pulls[self.offer.weights.sha256] = self._pull_of(self.offer.weights)
        self._uplink.ask(self.offer.job, weights.start(now))

    def turn(self, now: float) -> float | None:
        """Continue the download; returns the seconds that it took, once it is complete."""
        if self.offer is None:
            return None
        if self._web is not None and self._web.over():
            self._web = None
            self._prepare(self.offer)  # what the web server didn't give
            self.connected(now)
        if self._web is None and all(pull.done for pull in self._pulls.values()):
            self.offer = None
            return now - self._began
        self._pull(lambda pull: pull.on_tick(now))
        return None

    def stop(self) -> None:
        self.offer = None
        self._pulls = {}
        self._stop_web()

    def join(self, timeout: float) -> None:
        """Wait for the web's thread, but no longer than `timeout` seconds."""
        if self._last_web is not None:
            self._last_web.join(timeout)

    def _stop_web(self) -> None:
        if self._web is not None:
            self._web.stop()
            self._web = None

    def _prepare(self, offer: Offer) -> None:
        store = self._store
        refs = offer.blobs() if self._plainly else offer.shorter(store.has)
        self._pulls = {ref.sha256: self._pull_of(ref) for ref in refs if not store.has(ref.sha256)}
        self.offer = offer

    def _pull_of(self, ref: BlobRef) -> Pull:
        partial_blob = self._store.partial(ref, vouched=True)  # a signed offer names both of its digests
        lend = partial(reuse_leaves, self._store)
        return Pull(ref, partial_blob, limit=self._limit, answers=self._connection.answers, lend=lend)

    def _pull(self, step: Callable[[Pull], list[BlobRequest]]) -> None:
        """Send the requests of a step, unless the web server is sending: chunks that arrive then are late ones."""
        if self.offer is not None and self._web is None:
            pulls = [pull for pull in self._pulls.values() if not pull.done]
            self._uplink.ask(self.offer.job, [request for pull in pulls for request in step(pull)])
