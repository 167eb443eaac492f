"""Where an offer's blobs come from first: from the web server that it names, and what that doesn't give over MQTT."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Sequence

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_url import BlobUrl
from fedprune.wire.broker_url import tls_context
from fedprune.wire.offer import Offer
from fedprune_device.network.http_fetch import LEAST_BYTES_PER_S, STALL_S, HttpFetch

_LOG = logging.getLogger("fedprune.device")


class HttpDownload:
    """One fetch at a time, for the current offer. All of it is quick: a thread does the work.

    Args:
        store: Where blobs end up.
        context: Gives TLS, with what vouches for web servers; the system's authorities by default.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        store: BlobStore,
        context: Callable[[], ssl.SSLContext] = tls_context,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._context, self._clock = store, context, clock
        self._fetch: HttpFetch | None = None
        self._last: HttpFetch | None = None

    def begin(self, offer: Offer, refs: Sequence[BlobRef]) -> bool:
        """Begin to fetch what is lacking for an offer, if that names a web server.

        Args:
            offer: The offer.
            refs: What is lacking.

        Returns:
            Whether something is fetched now.
        """
        self.stop()
        if offer.blobs_at is None or not refs:
            return False
        self._fetch = self._last = HttpFetch(
            self._store, BlobUrl.parse(offer.blobs_at), refs, self._context, self._clock
        )
        return True

    @property
    def fetching(self) -> bool:
        """Whether something is fetched, or was and nobody has asked for its `outcome` yet."""
        return self._fetch is not None

    @property
    def progress(self) -> tuple[int, int]:
        """Leaves that are there, and leaves in all."""
        return (0, 0) if self._fetch is None else (self._fetch.done, self._fetch.total)

    def over(self) -> bool:
        """Whether what was begun has just ended; what is lacking then is for MQTT."""
        fetch = self._fetch
        if fetch is None:
            return False
        if fetch.alive and fetch.stalled:
            least = f"{LEAST_BYTES_PER_S / 1024:g} KiB a second"
            fetch.stop(f"nothing more has come for {STALL_S:g} s, or it is as far behind {least}")
        if fetch.alive:
            return False
        self._fetch = None
        if fetch.failure:
            _LOG.warning(
                "blobs at %s: %s; what is lacking comes over MQTT, %d bytes came from there",
                fetch.base,
                fetch.failure,
                fetch.bytes,
            )
        else:
            _LOG.info("%d bytes came from %s", fetch.bytes, fetch.base)
        return True

    def stop(self) -> None:
        """Fetch no more."""
        if self._fetch is not None:
            self._fetch.stop()
            self._fetch = None

    def join(self, timeout: float) -> None:
        """Wait for the last thread's end, but no longer than `timeout` seconds."""
        if self._last is not None:
            self._last.join(timeout)
