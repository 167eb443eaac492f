"""Messages of a device to its server: signs of life, progress, refusals and updates.

Nothing here is lost for good when the connection is down: births, updates and refusals are sent again.
"""

from __future__ import annotations

import logging
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from secrets import SystemRandom
from typing import Any

from msgspec.structs import replace

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ExitCode, FedpruneError
from fedprune.core.metrics import BLEND, served_metrics
from fedprune.wire.chunk import DEFAULT_MAX_PACKET
from fedprune.wire.link import tls_context
from fedprune.wire.lost_pieces import LostPieces, dropping_broker_message
from fedprune.wire.messages import (
    Alive,
    BlobNotFound,
    BlobRequest,
    Message,
    Offer,
    Refusal,
    RoundProgress,
    UpdateAnnouncement,
    UploadRequest,
    UploadResult,
)
from fedprune.wire.queues import HIGH_WATER
from fedprune.wire.topics import NO_JOB
from fedprune.wire.transfer import BlobSender, SeenRequests, with_request_id
from fedprune.wire.urls import UploadUrl
from fedprune_device.hardware.readings import temperature_c
from fedprune_device.network.connection import BoardConnection
from fedprune_device.network.http_upload import HttpUpload
from fedprune_device.privacy.redaction import refusal_reason

_LOG = logging.getLogger("fedprune.device")

PROGRESS_INTERVAL_S = 1.0  # between two reports of progress
# First and longest wait before an update is announced again; each wait is twice the last, ±25 %, so that boards of one
# round don't announce at the same moments.
MIN_ANNOUNCE_INTERVAL_S = 2.0
MAX_ANNOUNCE_INTERVAL_S = 60.0
# Seconds of silence after which a board sends a sign of life: its broker may not report when it is gone.
ALIVE_INTERVAL_S = 300.0

_MAX_REQUESTS = 64  # requests that are kept; the server repeats those that are dropped beyond


class Backoff:
    """The times at which to repeat a message that the server has not answered: soon at first, then ever less often."""

    def __init__(self) -> None:
        self.next_at, self.count = 0.0, 0

    def restart(self, now: float) -> None:
        """Begin again: the next time is now."""
        self.next_at, self.count = now, 0

    def take_if_due(self, now: float) -> bool:
        """Whether it is time; then the next time is set."""
        if now < self.next_at:
            return False
        wait = min(MAX_ANNOUNCE_INTERVAL_S, MIN_ANNOUNCE_INTERVAL_S * 2.0 ** min(self.count, 10))
        self.count += 1
        self.next_at = now + wait * SystemRandom().uniform(0.75, 1.25)
        return True


class BoardStatus:
    """The status that the board's local interface shows. One thread writes it and others read it, so its dictionaries
    are replaced, never changed."""

    def __init__(self) -> None:
        self.connected = False
        self._work: dict[str, Any] = {
            "job": None,
            "round": None,
            "phase": "idle",
            "done": 0,
            "total": 0,
            "alone": False,
        }
        self._error: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}

    def set_working(self, offer: Offer, status: tuple[str, int, int], *, alone: bool = False) -> None:
        self._set_work(offer, *status, alone=alone)

    def set_announcing(self, update: UpdateAnnouncement) -> None:
        self._set_work(update, "announce")
        shares = {n: v for n, v in update.metrics.items() if n == BLEND}
        self._metrics = served_metrics(update.metrics) | shares

    def set_idle(self) -> None:
        if self._work["phase"] != "idle":
            self._work = {**self._work, "phase": "idle", "done": 0, "total": 0, "alone": False}

    def set_failure(self, offer: Offer, reason: str) -> None:
        self._error = {"job": offer.job, "round": offer.round, "reason": reason[:500]}

    def to_dict(self) -> dict[str, Any]:
        return {"connected": self.connected, **self._work, "last_error": self._error, "metrics": self._metrics}

    def _set_work(
        self, message: Offer | UpdateAnnouncement, phase: str, done: int = 0, total: int = 0, *, alone: bool = False
    ) -> None:
        progress = {"phase": phase, "done": done, "total": total}
        self._work = {"job": message.job, "round": message.round, **progress, "alone": alone}


class Uplink:
    """Sends progress, updates, refusals and signs of life, and shows other threads what the board works on."""

    def __init__(
        self,
        connection: BoardConnection,
        blobs: BlobStore,
        max_packet: int = DEFAULT_MAX_PACKET,
        status: BoardStatus | None = None,
        context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self._connection, self._device = connection, connection.device
        self._blobs, self._blob_sender = blobs, BlobSender(blobs)
        self._max_packet, self._context = max_packet, context
        self._upload: HttpUpload | None = None
        self._last_upload: HttpUpload | None = None
        self._uploaded: tuple[UpdateAnnouncement, UploadUrl] | None = None
        self.status = status or BoardStatus()
        self._is_duplicate = SeenRequests().is_duplicate
        self._lost_downloads, self._lost_uploads = LostPieces(), LostPieces()
        self._requests: deque[tuple[UpdateAnnouncement, BlobRequest]] = deque()
        self._chunks: Iterator[bytes] = iter(())
        self._chunks_job = NO_JOB
        self._announcements = Backoff()
        self._last_progress: tuple[str, int, int] | None = None
        self._next_progress_at = 0.0
        self._has_sent = True
        self._quiet_since = 0.0
        self._refused_offer: Offer | None = None
        self._refusal: Refusal | None = None

    def send(self, message: Message, job: str = NO_JOB, qos: int = 1) -> None:
        self._has_sent = True
        self._connection.send(message, job, qos)

    def request_chunks(self, job: str, requests: Iterable[BlobRequest]) -> None:
        for request in requests:
            if self._lost_downloads.note_request(request, self._connection.clock()):
                advice = dropping_broker_message("what the server sends")
                _LOG.warning("no piece of blob %s comes: %s", request.sha256[:12], advice)
            self.send(with_request_id(request), job)

    def on_blob_request(self, request: BlobRequest, pending: UpdateAnnouncement | None, now: float) -> None:
        """Queue a request of the server for the update, and pause its announcements meanwhile."""
        if pending is None or pending.weights.sha256 != request.sha256:
            self.send(BlobNotFound(request.sha256))  # only the update may be requested
            return
        if self._is_duplicate(self._device, request):
            return
        if self._lost_uploads.note_request(request, now):
            advice = dropping_broker_message("what this board sends")
            _LOG.warning("the server asks for the same piece of the update again and again: %s", advice)
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
            self.send(BlobNotFound(request.sha256))
            return
        if self._is_duplicate(self._device, request):
            return
        url, running_upload = UploadUrl.parse(request.url), self._upload
        if self._uploaded == (pending, url):
            self._report_upload(pending, None)  # the report was lost, or the server has not read it yet
            return
        if running_upload is not None:
            if running_upload.ref == pending.weights and (running_upload.url.host, running_upload.url.port) == (
                url.host,
                url.port,
            ):
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
            failure = _printable(upload.failure)[:400] or None
            if failure is None:
                self._uploaded = pending, upload.url
            self._report_upload(pending, failure)
            self._announcements.next_at = max(self._announcements.next_at, now + MIN_ANNOUNCE_INTERVAL_S)

    def _report_upload(self, update: UpdateAnnouncement, failure: str | None) -> None:
        self.send(UploadResult(update.weights.sha256, failure), update.job)

    def stop_upload(self, timeout: float) -> None:
        """Stop the upload, and wait for the end of its thread, but no longer than `timeout` seconds."""
        if self._last_upload is not None:
            self._last_upload.stop()
            self._last_upload.join(timeout)

    def send_chunks(self) -> None:
        """Send requested chunks while little is unsent, so that messages wait behind few of them."""
        while self._connection.unsent_bytes < HIGH_WATER:
            chunk = next(self._chunks, None)
            if chunk is not None:
                if not self._connection.send_chunk(chunk, self._chunks_job):
                    self.drop_chunks()  # what doesn't get through is asked for again
            elif self._requests:
                update, request = self._requests.popleft()
                answer = self._blob_sender.answer(request, self._max_packet)
                if isinstance(answer, BlobNotFound):
                    self.send(answer, update.job)
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
        self.status.set_announcing(update)
        if self._upload is not None and self._announcements.count > 0:
            return  # during an upload only the first announcement after `announce_soon` is sent
        if self._announcements.take_if_due(now):
            self.send(update, update.job)

    def report_progress(self, offer: Offer, status: tuple[str, int, int], now: float) -> None:
        """Report an offer's progress (phase, units done, units in all) if it has changed, at most once a second."""
        self.status.set_working(offer, status)
        if now < self._next_progress_at or status == self._last_progress:
            return
        self._last_progress, self._next_progress_at = status, now + PROGRESS_INTERVAL_S
        phase, done, total = status
        message = RoundProgress(
            device=self._device,
            job=offer.job,
            round=offer.round,
            attempt=offer.attempt,
            phase=phase,
            done=done,
            total=total,
            temperature_c=temperature_c(),
        )
        self.send(message, offer.job, 0)

    def send_alive(self, session: int, now: float) -> None:
        """Send a sign of life after minutes of silence."""
        if not self._has_sent and now - self._quiet_since >= ALIVE_INTERVAL_S:
            self.send(Alive(self._device, session), qos=0)
        if self._has_sent:
            self._has_sent, self._quiet_since = False, now

    def refuse(self, offer: Offer, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, FedpruneError) else ExitCode.INTERNAL
        reason = refusal_reason(error, private=False)
        _LOG.warning("round %d of job %s: refused: %s", offer.round, offer.job, reason)
        self.status.set_failure(offer, _printable(reason))
        self._refused_offer = offer
        sent_reason = _printable(refusal_reason(error, private=bool(offer.recipe.get("update_clip"))))
        self._refusal = Refusal(self._device, offer.job, offer.round, offer.attempt, sent_reason, int(code))
        self.send(self._refusal, offer.job)

    def repeat_refusal(self, offer: Offer) -> bool:
        """Repeat the last refusal, if it was of this very offer; returns whether it was."""
        if self._refusal is None or self._refused_offer != offer:
            return False
        self.send(self._refusal, offer.job)
        return True

    def forget_refusal(self) -> None:
        """Forget the refused offer, which is no longer open: if it comes again, it is a new one."""
        self._refused_offer = self._refusal = None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:4000]
