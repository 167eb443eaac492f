"""The download of an offer's blobs: from the web server that the offer names, and the rest over MQTT."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, Chunk, ChunkLimit
from fedprune.wire.link import tls_context
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.transfer import Pull
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.connection import BoardConnection
from fedprune_device.network.http_download import HttpFetch, reuse_leaves
from fedprune_device.network.uplink import Uplink


class Downloader:
    """Downloads the blobs of one offer at a time, in parallel. No call waits for the network.

    Weights are downloaded in their shorter encoded form if there is one, and plainly if the server no longer has it.
    They are decoded later, by the round that uses them. `offer` is being downloaded; it is None if nothing is.
    """

    def __init__(
        self,
        store: BlobStore,
        connection: BoardConnection,
        uplink: Uplink,
        max_packet: int = DEFAULT_MAX_PACKET,
        context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self.offer: Offer | None = None
        self._store, self._connection, self._uplink = store, connection, uplink
        self._limit, self._context = ChunkLimit(max_packet), context
        self._web_fetch: HttpFetch | None = None
        self._last_web_fetch: HttpFetch | None = None
        self._pulls: dict[str, Pull] = {}
        self._began_at = 0.0
        self._without_codec = False

    @property
    def is_fetching_from_web(self) -> bool:
        return self._web_fetch is not None

    @property
    def progress(self) -> tuple[int, int]:
        transfers = self._pulls.values() if self._web_fetch is None else [self._web_fetch]
        progresses = [transfer.progress for transfer in transfers]
        return sum(done for done, _ in progresses), sum(total for _, total in progresses)

    def begin(self, offer: Offer, now: float, *, without_codec: bool = False, is_connected: bool = True) -> None:
        """Begin with another offer; `without_codec`: without encoded weights; `is_connected`: the connection is up.

        Raises `StorageFullError` if there is no room, and `ProtocolError` if a reference contradicts itself.
        """
        self._without_codec, self._began_at = without_codec, now
        self._prepare_pulls(offer)
        self._stop_web()
        missing = tuple(pull.ref for pull in self._pulls.values())
        if offer.blobs_at is not None and missing:
            base = BlobUrl.parse(offer.blobs_at)
            self._web_fetch = self._last_web_fetch = HttpFetch(self._store, base, missing, self._context)
        elif is_connected:
            self.on_connect(now)

    def renumber(self, offer: Offer) -> None:
        """Continue the download for another attempt at the same work."""
        if self.offer is not None:
            self.offer = offer

    def on_connect(self, now: float) -> None:
        """Request everything that is missing: requests of an earlier connection are lost."""
        self._request(lambda pull: pull.start(now))

    def repeat_requests(self, now: float) -> None:
        """Repeat all requests: the server has announced itself, and may be a new one."""
        self._request(lambda pull: pull.repeat_due(now))

    def on_chunk(self, chunk: Chunk, now: float) -> None:
        """Store a chunk. Raises `ProtocolError` if this server can't send the blob."""
        self._request(lambda pull: pull.on_chunk(chunk, now) if pull.ref.sha256 == chunk.sha256 else [])

    def on_blob_not_found(self, sha256: str, now: float) -> None:
        """Note that the server lacks a blob: plain weights are requested in place of encoded ones, and for any other
        blob `ProtocolError` is raised."""
        pull = self._pulls.get(sha256)
        if self.offer is None or self._web_fetch is not None or pull is None or pull.is_done:
            return
        if pull.ref not in self.offer.encoded:
            raise ProtocolError(f"the server no longer has blob {sha256[:12]}")
        pulls, self._without_codec = self._pulls, True
        self._prepare_pulls(self.offer)
        started = {digest: pulls[digest] for digest in self._pulls if digest in pulls}
        self._pulls |= started
        self._request(lambda pull: [] if pull.ref.sha256 in started else pull.start(now))

    def turn(self, now: float) -> float | None:
        """Continue the download; returns the seconds that it took, once it is complete."""
        if self.offer is None:
            return None
        if self._web_fetch is not None and self._web_fetch.is_over():
            self._web_fetch = None
            self._prepare_pulls(self.offer)  # what the web server didn't give
            self.on_connect(now)
        if self._web_fetch is None and all(pull.is_done for pull in self._pulls.values()):
            self.offer = None
            return now - self._began_at
        self._request(lambda pull: pull.on_tick(now))
        return None

    def stop(self) -> None:
        self.offer = None
        self._pulls = {}
        self._stop_web()

    def join(self, timeout: float) -> None:
        """Wait for the web's thread, but no longer than `timeout` seconds."""
        if self._last_web_fetch is not None:
            self._last_web_fetch.join(timeout)

    def _stop_web(self) -> None:
        if self._web_fetch is not None:
            self._web_fetch.stop()
            self._web_fetch = None

    def _prepare_pulls(self, offer: Offer) -> None:
        store = self._store
        refs = offer.blobs() if self._without_codec else offer.blobs_to_pull(store.has)
        self._pulls = {ref.sha256: self._new_pull(ref) for ref in refs if not store.has(ref.sha256)}
        self.offer = offer

    def _new_pull(self, ref: BlobRef) -> Pull:
        partial_blob = self._store.partial(ref, vouched=True)  # a signed offer names both of its digests
        lend = partial(reuse_leaves, self._store)
        return Pull(ref, partial_blob, limit=self._limit, answers=self._connection.response_time, lend=lend)

    def _request(self, step: Callable[[Pull], list[BlobRequest]]) -> None:
        """Send the requests of a step, unless the web server is sending: chunks that arrive then are late ones."""
        if self.offer is not None and self._web_fetch is None:
            pulls = [pull for pull in self._pulls.values() if not pull.is_done]
            self._uplink.request_chunks(self.offer.job, [request for pull in pulls for request in step(pull)])
