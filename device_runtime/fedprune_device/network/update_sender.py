"""Sends a board's finished update: announces it until the server answers, and gives the bytes that the server requests.

The server fetches the bytes over MQTT, in chunks, or names a URL to which the board uploads them over HTTPS.
"""

from __future__ import annotations

import base64
import http.client
import logging
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import DEFAULT_MAX_PACKET
from fedprune.wire.link import tls_context
from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import BlobNotFound, BlobRequest, UpdateAnnouncement, UploadRequest, UploadResult
from fedprune.wire.queues import HIGH_WATER
from fedprune.wire.request_numbers import SeenRequests
from fedprune.wire.topics import NO_JOB
from fedprune.wire.transfer import MIN_BYTES_PER_S
from fedprune.wire.urls import UploadUrl
from fedprune_device.network import http_transfer
from fedprune_device.network.backoff import MIN_ANNOUNCE_INTERVAL_S, Backoff
from fedprune_device.network.connection import BoardConnection
from fedprune_device.network.http_transfer import HttpTransfer, HttpTransferError
from fedprune_device.network.uplink import Uplink

_LOG = logging.getLogger("fedprune.device")

_MAX_REQUESTS = 64  # requests that are kept; the server repeats those that are dropped beyond


_SUCCESS_STATUSES = (200, 201, 204)
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")  # an object store's reason
_REASON_BYTES = 2048


class HttpUpload(HttpTransfer):
    """Uploads a blob of a store to an address, beginning at once."""

    def __init__(self, store: BlobStore, url: UploadUrl, ref: BlobRef, context: Callable[[], ssl.SSLContext]) -> None:
        super().__init__(url, context, time.monotonic, http_transfer.STALL_TIMEOUT_S)
        self.url, self.ref = url, ref
        self._store = store
        self._thread.start()

    def _log_end(self) -> None:
        if self.failure:
            _LOG.warning("the update can't be uploaded to %s: %s; it goes over MQTT", self.url, self.failure)
        else:
            _LOG.info("%d bytes of the update were uploaded to %s", self.ref.size, self.url)

    def _transfer(self) -> None:
        checksum = base64.b64encode(bytes.fromhex(self.ref.sha256)).decode()
        with self._pause_stall_clock():
            file = self._store.open(self.ref.sha256)
        with file:
            connection = self._connection
            connection.putrequest("PUT", self.url.target, skip_accept_encoding=True)
            for name, value in (
                ("Content-Length", str(self.ref.size)),
                ("Content-Type", "application/octet-stream"),
                # By it a bucket verifies the bytes.
                ("x-amz-checksum-sha256", checksum),
                ("User-Agent", "fedprune"),
            ):
                connection.putheader(name, value)
            try:
                connection.endheaders()
                while chunk := file.read(LEAF_BYTES):
                    self._check_stop()
                    connection.send(chunk)
                    self._note_progress(len(chunk) / MIN_BYTES_PER_S)
            except (ConnectionError, ssl.SSLError):
                if connection.sock is None:
                    raise
                self._read_refusal(connection)  # the server may have sent the reason before it hung up
                raise
            self._check_answer(connection.getresponse())

    def _read_refusal(self, connection: http.client.HTTPConnection) -> None:
        try:
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            return
        self._check_answer(answer)

    def _check_answer(self, answer: http.client.HTTPResponse) -> None:
        if answer.status in _SUCCESS_STATUSES:
            return
        code = _CODE.search(answer.read(_REASON_BYTES) if answer.status >= 400 else b"")
        raise HttpTransferError(f"it answers {answer.status}" + (f" ({code[1].decode()})" if code else ""))


class UpdateSender:
    """Sends one update at a time: `pending`, which the server has not acknowledged yet (None: there is none)."""

    def __init__(
        self,
        connection: BoardConnection,
        uplink: Uplink,
        blobs: BlobStore,
        max_packet: int = DEFAULT_MAX_PACKET,
        context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self._connection, self._uplink = connection, uplink
        self._blobs, self._blob_sender = blobs, BlobSender(blobs)
        self._max_packet, self._context = max_packet, context
        self._upload: HttpUpload | None = None
        self._last_upload: HttpUpload | None = None
        self._uploaded: tuple[UpdateAnnouncement, UploadUrl] | None = None
        self._is_duplicate = SeenRequests().is_duplicate
        self._lost_uploads = LostPieces()
        self._requests: deque[tuple[UpdateAnnouncement, BlobRequest]] = deque()
        self._chunks: Iterator[bytes] = iter(())
        self._chunks_job = NO_JOB
        self._announcements = Backoff()

    def on_blob_request(self, request: BlobRequest, pending: UpdateAnnouncement | None, now: float) -> None:
        """Queue a request of the server for the update, and pause its announcements meanwhile."""
        if pending is None or pending.weights.sha256 != request.sha256:
            self._uplink.send(BlobNotFound(request.sha256))  # only the update may be requested
            return
        if self._is_duplicate(self._connection.device, request):
            return
        if self._lost_uploads.note_request(request, now):
            advice = dropping_broker_message("what this board sends")
            _LOG.warning("the server asks for the same piece of the update again and again: it is slow, or %s", advice)
        request = replace(request, number=None)  # two requests for the same pieces are answered once
        if (pending, request) not in self._requests and len(self._requests) < _MAX_REQUESTS:
            self._requests.append((pending, request))
        self.send_chunks()
        self._announcements.next_at = max(self._announcements.next_at, now + 5 * MIN_ANNOUNCE_INTERVAL_S)

    @property
    def is_uploading(self) -> bool:
        return self._upload is not None

    def start_upload(self, request: UploadRequest, pending: UpdateAnnouncement | None) -> None:
        """Begin to upload the update to where the server wants it."""
        if pending is None or pending.weights.sha256 != request.sha256:
            self._uplink.send(BlobNotFound(request.sha256))
            return
        if self._is_duplicate(self._connection.device, request):
            return
        url, running_upload = UploadUrl.parse(request.url), self._upload
        if self._uploaded == (pending, url):
            self._report_upload(pending, None)  # the report was lost, or the server has not read it yet
            return
        if running_upload is not None:
            running_url = running_upload.url
            is_same_server = (running_url.host, running_url.port) == (url.host, url.port)
            if running_upload.ref == pending.weights and is_same_server:
                return  # it is on its way there
            running_upload.stop()
        self._upload = self._last_upload = HttpUpload(self._blobs, url, pending.weights, self._context)

    def continue_upload(self, pending: UpdateAnnouncement | None, now: float) -> None:
        """Report the end of an upload; stop it if its update is no longer pending."""
        upload = self._upload
        if upload is None:
            return
        if pending is None or pending.weights != upload.ref:
            upload.stop()
            self._upload = None
        elif upload.is_over():
            self._upload = None
            failure = upload.failure[:400] or None
            if failure is None:
                self._uploaded = pending, upload.url
            self._report_upload(pending, failure)
            self._announcements.next_at = max(self._announcements.next_at, now + MIN_ANNOUNCE_INTERVAL_S)

    def _report_upload(self, update: UpdateAnnouncement, failure: str | None) -> None:
        self._uplink.send(UploadResult(update.weights.sha256, failure), update.job)

    def stop_upload(self, timeout: float) -> None:
        """Stop the upload, and wait for the end of its thread, but no longer than `timeout` seconds."""
        if self._last_upload is not None:
            self._last_upload.stop()
            self._last_upload.join(timeout)

    def send_chunks(self) -> None:
        """Send requested chunks while little is unsent, so that messages wait behind few of them."""
        while self._connection.link.unsent < HIGH_WATER:
            chunk = next(self._chunks, None)
            if chunk is not None:
                if not self._connection.send_chunk(chunk, self._chunks_job):
                    self.drop_chunks()  # what doesn't get through is asked for again
            elif self._requests:
                update, request = self._requests.popleft()
                answer = self._blob_sender.answer(request, self._max_packet)
                if isinstance(answer, BlobNotFound):
                    self._uplink.send(answer, update.job)
                else:
                    self._chunks, self._chunks_job = answer, update.job
            else:
                return

    def drop_chunks(self) -> None:
        """Drop the server's requests, because the connection is lost or the update is no longer pending."""
        self._requests.clear()
        self._chunks = iter(())

    def announce_soon(self, now: float) -> None:
        """Announce the update at the next turn, and often at first, because it or the connection is new."""
        self._announcements.restart(now)

    def announce(self, update: UpdateAnnouncement, now: float) -> None:
        """Announce an update, if it is time to, ever less often."""
        self._uplink.status.set_announcing(update)
        if self._upload is not None and self._announcements.count > 0:
            return  # during an upload only the first announcement after `announce_soon` is sent
        if self._announcements.take_if_due(now):
            self._uplink.send(update, update.job)
