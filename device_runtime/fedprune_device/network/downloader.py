"""The download of what an offer needs: from the web server that it names, and the rest over MQTT."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from fedprune.wire.chunk import MAX_PACKET, Chunk, ChunkLimit
from fedprune.wire.link import tls_context
from fedprune.wire.messages import BlobRequest, Offer
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.blob_download import BlobDownloads
from fedprune_device.network.connection import Connection
from fedprune_device.network.http_download import HttpFetch
from fedprune_device.network.uplink import Uplink
from fedprune_device.storage.state_directory import DeviceStore


class Downloader:
    """Downloads the blobs of one offer at a time. No call waits for the network."""

    def __init__(
        self,
        store: DeviceStore,
        connection: Connection,
        uplink: Uplink,
        max_packet: int = MAX_PACKET,
        context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self._store, self._connection, self._uplink = store, connection, uplink
        self._limit, self._context = ChunkLimit(max_packet), context
        self._web: HttpFetch | None = None
        self._last_web: HttpFetch | None = None
        self._downloads: BlobDownloads | None = None
        self._plainly = False

    @property
    def offer(self) -> Offer | None:
        return None if self._downloads is None else self._downloads.offer

    @property
    def fetching(self) -> bool:
        return self._web is not None

    @property
    def progress(self) -> tuple[int, int]:
        part = self._web or self._downloads
        return (0, 0) if part is None else part.progress

    def begin(self, offer: Offer, now: float, *, plainly: bool = False, asks: bool = True) -> None:
        """Begin with another offer; `plainly`: with weights as they are; `asks`: the server can be asked."""
        self._plainly = plainly
        downloads = self._downloads = self._to_pull(offer, now)
        self._stop_web()
        if offer.blobs_at is not None and downloads.lacking:
            base = BlobUrl.parse(offer.blobs_at)
            self._web = self._last_web = HttpFetch(self._store.blobs, base, downloads.lacking, self._context)
        elif asks:
            self._ask(downloads, downloads.start(now))

    def renumber(self, offer: Offer) -> None:
        """Continue the download for another attempt at the same work."""
        if self._downloads is not None:
            self._downloads.offer = offer

    def connected(self, now: float) -> None:
        if self._downloads is not None and self._web is None:
            self._ask(self._downloads, self._downloads.start(now))

    def remind(self, now: float) -> None:
        """Repeat all requests: the server has announced itself, and may be a new one."""
        if self._downloads is not None and self._web is None:
            self._ask(self._downloads, self._downloads.remind(now))

    def chunk(self, chunk: Chunk, now: float) -> None:
        self._pull(lambda downloads: downloads.chunk(chunk, now))

    def gone(self, sha256: str, now: float) -> None:
        self._pull(lambda downloads: downloads.gone(sha256, now))

    def turn(self, now: float) -> float | None:
        """Go on with what is being downloaded; returns the seconds that it took, once it is complete."""
        took = None
        if self._downloads is not None and self._web is not None and self._web.over():
            self._web = None
            self._pull_rest(self._downloads, now)
        if self._downloads is not None and self._web is None:
            if self._downloads.done:
                took = now - self._downloads.began
                self._downloads = None
            else:
                self._pull(lambda downloads: downloads.tick(now))
        return took

    def stop(self) -> None:
        self._downloads = None
        self._stop_web()

    def join(self, timeout: float) -> None:
        """Wait for the web's thread, but no longer than `timeout` seconds."""
        if self._last_web is not None:
            self._last_web.join(timeout)

    def _stop_web(self) -> None:
        if self._web is not None:
            self._web.stop()
            self._web = None

    def _pull_rest(self, before: BlobDownloads, now: float) -> None:
        """Pull over MQTT what the web server didn't give."""
        downloads = self._downloads = self._to_pull(before.offer, now)
        downloads.began = before.began
        self._ask(downloads, downloads.start(now))

    def _to_pull(self, offer: Offer, now: float) -> BlobDownloads:
        return BlobDownloads(
            self._store.blobs, offer, now, self._limit, self._connection.answers, plainly=self._plainly
        )

    def _pull(self, step: Callable[[BlobDownloads], list[BlobRequest]]) -> None:
        downloads = self._downloads
        if downloads is not None and self._web is None:  # what comes meanwhile was asked for before
            self._ask(downloads, step(downloads))

    def _ask(self, downloads: BlobDownloads, wants: list[BlobRequest]) -> None:
        self._uplink.ask(downloads.offer.job, wants)
