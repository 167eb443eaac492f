"""Fetches devices' updates: a few at a time are pulled over MQTT or uploaded to a web server, others wait.

Progress is counted in *leaves*, the pieces of fixed size into which a blob is divided. A *birth* is a device's
announcement of itself after it has connected.
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, Chunk, ChunkLimit
from fedprune.wire.messages import BlobRequest, UploadRequest, UploadResult
from fedprune.wire.response_time import ResponseTime
from fedprune.wire.transfer import MIN_BYTES_PER_S, Pull
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.upload_place import ArrivedUpdate, FailedUpload, Outcome, UploadPlace

log = logging.getLogger("fedprune.server")

# Seconds without a byte after which a transfer gives its place to a waiting one. So does a transfer that was slower
# than `MIN_BYTES_PER_S` on average since it got its place, at least these seconds ago.
STALL_TIMEOUT_S = 30.0

# Seconds after a request to upload in which an announcement counts as sent before the request came. A device that
# announces its update later hasn't got the request, and gets it again.
REQUEST_REPEAT_S = 5.0

LOST_REASON = "the device no longer has the update that it announced"


DeviceRequests = list[tuple[str, BlobRequest | UploadRequest]]


@dataclass
class _Upload:
    """An update on its way. It is in one of three states: pulled over MQTT, requested from the device as an upload, or
    else waiting for a place.

    Attributes:
        pull: The transfer over MQTT; None in the other states.
        is_requested: Whether the device was asked to upload the update; False in the other states.
        requested_at: Time of that request.
        pull_only: Whether an upload has failed or was too slow, so that the update is only pulled from now on.
        leaves: Leaves that have arrived.
        progressed_at: Time at which the last leaf arrived.
        began_at: Time at which the update got its place.
        leaves_at_start: Leaves that had arrived then.
    """

    round: int
    attempt: int
    ref: BlobRef
    pull: Pull | None = None
    is_requested: bool = False
    requested_at: float = 0.0
    pull_only: bool = False
    leaves: int = 0
    progressed_at: float = 0.0
    began_at: float = 0.0
    leaves_at_start: int = 0

    def is_slow(self, now: float) -> bool:
        """Whether nothing has arrived for a while, or too little since it got its place."""
        seconds = now - self.began_at
        has_little = (self.leaves - self.leaves_at_start) * LEAF_BYTES < MIN_BYTES_PER_S * seconds
        return now - self.progressed_at > STALL_TIMEOUT_S or (seconds > STALL_TIMEOUT_S and has_little)


class Uploads:
    """The updates that are being fetched, at most one per device. Does no network I/O: methods return the requests to
    send.

    Args:
        sync: Has the store of updates, and copies them into the bucket.
        concurrent: Number of updates that are pulled at a time, which bounds the memory of broker and server.
        max_packet: Maximum bytes of an MQTT packet that the broker lets through.
        place: The place to which able devices upload; nowhere by default. Updates that can't be uploaded are pulled.
    """

    def __init__(
        self,
        sync: BucketSync,
        concurrent: int = 4,
        max_packet: int = DEFAULT_MAX_PACKET,
        place: UploadPlace | None = None,
    ) -> None:
        self._limit = ChunkLimit(max_packet)
        self._sync, self._store = sync, sync.local_store
        self._concurrent = concurrent
        self._place = place or UploadPlace()
        self._uploaders: set[str] = set()
        self._uploads: dict[str, _Upload] = {}
        self._response_times: dict[str, ResponseTime] = {}
        # Devices heard since the server's last reconnection, with their connections. Others get no place: their
        # requests would be lost. After `_all_present_at` all devices count as heard.
        self._present_sessions: dict[str, int | None] = {}
        self._all_present, self._all_present_at = True, 0.0
        self._last_ticket = 0
        self._waiting: dict[str, int] = {}  # tickets of waiting devices, which get their places in this order
        # A heap of the waiting devices that were heard. Entries of devices that no longer wait are skipped when they
        # come up, which is cheaper than to remove them.
        self._ready_queue: list[tuple[int, str]] = []
        self._running: set[str] = set()
        self._outcomes: list[Outcome] = []

    def add(self, device: str, round_: int, attempt: int, ref: BlobRef, now: float) -> DeviceRequests:
        """Fetch an update, once for all repeated calls. Raises `StorageError` if the store fails."""
        if not self.is_fetching(device, round_, attempt, ref):
            previous = self._uploads.get(device)
            self.drop(device)
            is_same_part = previous is not None and (previous.round, previous.attempt) == (round_, attempt)
            # A device that announces one update after another for the same part must not fill the disk with pieces.
            if previous is not None and is_same_part and previous.ref.sha256 not in self._fetched_digests():
                self._store.drop_partial(previous.ref.sha256)
            upload = self._uploads[device] = _Upload(round_, attempt, ref)
            if self._place.is_direct and device in self._uploaders:
                return self._begin_transfer(device, upload, now) + self.on_announcement(device, now)
            self._queue_up(device)
        return self.on_announcement(device, now)

    def on_announcement(self, device: str, now: float) -> DeviceRequests:
        """Handle a device's announcement of its update, which shows that the device is connected."""
        if device not in self._present_sessions:
            self._note_present(device, None)
        upload = self._uploads.get(device)
        if upload is None or not upload.is_requested:
            return self._start_next(now)
        is_overdue = now - max(upload.requested_at, upload.progressed_at) > REQUEST_REPEAT_S
        repeated_request = self._request_upload(device, upload, now) if is_overdue else []
        return repeated_request + self._start_next(now)

    def on_upload_result(self, device: str, result: UploadResult, now: float) -> DeviceRequests:
        """Handle a device's report on the end of its upload. A failed one is pulled."""
        requests = self.collect(now)
        upload = self._uploads.get(device)
        if upload is None or not upload.is_requested or upload.ref.sha256 != result.sha256:
            return requests
        if result.reason is None:
            self._place.on_report(device)
            return requests + self.collect(now)
        log.debug("device %s can't upload its update, which is pulled: %s", device, one_line(result.reason))
        return requests + self._switch_to_pull(device, upload, now)

    def collect(self, now: float) -> DeviceRequests:
        """Handle the uploads that have ended. Raises `StorageError` if the store fails."""
        requests: DeviceRequests = []
        for end in self._place.take_ended():
            upload = self._uploads.get(end.device)
            if upload is None or upload.ref != end.ref:
                continue
            if end.stored:
                arrived = ArrivedUpdate(end.device, upload.round, upload.attempt, upload.ref.sha256)
                requests += self._end_upload(end.device, arrived, now)
            elif upload.is_requested:
                requests += self._switch_to_pull(end.device, upload, now)
        return requests

    def on_chunk(self, device: str, chunk: Chunk, now: float) -> DeviceRequests:
        """Handle a chunk; one that no transfer awaits is ignored. Raises `StorageError` if the store fails."""
        upload = self._uploads.get(device)
        if upload is None or upload.pull is None or chunk.sha256 != upload.ref.sha256:
            return []
        try:
            requests = upload.pull.on_chunk(chunk, now)
        except ProtocolError as error:  # not malformed: chunks aren't signed, and anyone may have damaged them
            return self._fail_upload(device, str(error), now, FailureKind.OTHER)
        if upload.pull.is_done:
            return self._end_upload(device, ArrivedUpdate(device, upload.round, upload.attempt, upload.ref.sha256), now)
        leaves = upload.pull.progress[0]
        if leaves != upload.leaves:
            upload.leaves, upload.progressed_at = leaves, now
        return [(device, request) for request in requests]

    def on_blob_missing(self, device: str, sha256: str, now: float) -> DeviceRequests:
        """Handle a device's answer that it no longer has the update that it announced."""
        upload = self._uploads.get(device)
        if upload is None or upload.ref.sha256 != sha256:
            return []
        return self._fail_upload(device, LOST_REASON, now, FailureKind.GONE)

    def on_tick(self, now: float) -> DeviceRequests:
        """Repeat overdue requests, and let waiting updates take the places of stuck or slow ones."""
        for device in self._running:
            upload = self._uploads[device]
            if upload.is_requested:
                leaves = self._place.arrived_bytes(device) // LEAF_BYTES
                if leaves != upload.leaves:
                    upload.leaves, upload.progressed_at = leaves, now
        slow_devices = [name for name in self._running if self._uploads[name].is_slow(now)]
        for device in sorted(slow_devices) if self._waiting else ():
            upload = self._uploads[device]
            # Another upload would begin at the first byte; a pull continues.
            upload.pull_only = upload.pull_only or upload.is_requested
            self._stop_transfer(device, upload)
            self._running.discard(device)
            self._queue_up(device)
        requests: DeviceRequests = []
        for device in sorted(self._running):
            upload = self._uploads[device]
            if upload.pull is None:
                continue
            try:
                requests += [(device, request) for request in upload.pull.on_tick(now)]
            except ProtocolError as error:
                requests += self._fail_upload(device, str(error), now)
        return requests + self._start_next(now)

    def on_reconnect(self, now: float) -> None:
        """Begin again after the server's reconnection: chunks under way are lost. Devices get no requests and no place
        before they announce themselves: after the broker's restart they come back one by one.
        """
        self._all_present, self._all_present_at = False, now + STALL_TIMEOUT_S
        self._present_sessions.clear()
        self._ready_queue.clear()
        pulled = [name for name in sorted(self._running) if not self._uploads[name].is_requested]
        for device in pulled:
            upload = self._uploads[device]
            if upload.pull is not None:
                upload.pull.note_silence()
            self._stop_transfer(device, upload)
        waiting = [*pulled, *self._waiting]
        self._waiting.clear()
        for device in waiting:
            self._queue_up(device)
        self._running.difference_update(pulled)

    def on_birth(
        self, device: str, session: int, response_s: float, now: float, *, can_upload: bool = False
    ) -> DeviceRequests:
        """Handle a device's birth. On a new connection (session) the chunks under way are lost, and requested again.
        Answers come after `response_s`, as measured by the device; `can_upload` says whether it can upload to a web
        server."""
        self._response_times.setdefault(device, ResponseTime()).note_peer_measurement(response_s)
        can_upload = can_upload and self._place.accepts_uploads
        is_new_uploader = can_upload and device not in self._uploaders
        (self._uploaders.add if can_upload else self._uploaders.discard)(device)
        previous_session = self._present_sessions.get(device)
        self._note_present(device, session)
        upload = self._uploads.get(device)
        requests: DeviceRequests = []
        if is_new_uploader and upload is not None and not (upload.is_requested or upload.leaves):
            # Its first requests left before it was known that it can upload.
            return self._switch_to_upload(device, upload, now) + self._start_next(now)
        if upload is not None and upload.is_requested and not can_upload:
            return self._switch_to_pull(device, upload, now) + self._start_next(now)
        has_reconnected = previous_session not in (None, session)
        if upload is not None and has_reconnected and (upload.is_requested or upload.pull is not None):
            upload.progressed_at = upload.began_at = now  # the request went to its earlier connection
            upload.leaves_at_start = upload.leaves
            if upload.pull is None:
                requests = self._request_upload(device, upload, now)
            else:
                requests = [(device, request) for request in upload.pull.start(now)]
        return requests + self._start_next(now)

    def drop(self, device: str) -> list[str]:
        """Stop fetching from a device; returns the digests of the dropped updates. Arrived leaves stay on the disk,
        from which a later transfer continues."""
        upload = self._uploads.pop(device, None)
        if upload is None:
            return []
        self._waiting.pop(device, None)
        self._running.discard(device)
        if upload.pull is not None:
            # The device may be gone because of our request: brokers end the connection of a client whose chunk is too
            # large. `note_silence` counts against the size of chunks.
            upload.pull.note_silence()
        self._stop_transfer(device, upload)
        return [upload.ref.sha256]

    def keep(self, device: str, round_: int, attempt: int) -> list[str]:
        """Stop fetching from a device, unless the update is for this part of a round. Returns the digests of the
        dropped updates."""
        upload = self._uploads.get(device)
        return [] if upload is None or (upload.round, upload.attempt) == (round_, attempt) else self.drop(device)

    def is_fetching(self, device: str, round_: int, attempt: int, ref: BlobRef) -> bool:
        """Whether this very update is being fetched, or waits to be."""
        upload = self._uploads.get(device)
        return upload is not None and (upload.round, upload.attempt, upload.ref) == (round_, attempt, ref)

    def devices(self) -> list[str]:
        """Devices whose updates are being fetched, or wait for it."""
        return list(self._uploads)

    def digests(self) -> set[str]:
        """Digests of updates that are being fetched, wait for it, or are being copied into the bucket."""
        return self._fetched_digests() | self._sync.digests

    def _fetched_digests(self) -> set[str]:
        return {u.ref.sha256 for u in self._uploads.values()}

    def take_outcomes(self) -> list[Outcome]:
        """Outcomes since the last call, of updates that the store has. Raises `StorageError` if the store fails."""
        ended, self._outcomes = self._outcomes, []
        return self._sync.take_stored(ended)

    def take_byte_counts(self) -> dict[str, int]:
        """Bytes that devices have uploaded since the last call."""
        return self._place.take_byte_counts()

    def progress(self, device: str) -> tuple[int, int] | None:
        """Arrived leaves and all leaves of a device's update; None if none is being fetched."""
        upload = self._uploads.get(device)
        if upload is not None and upload.is_requested:
            return upload.leaves, upload.ref.leaf_count
        return None if upload is None or upload.pull is None else upload.pull.progress

    def _stop_transfer(self, device: str, upload: _Upload) -> None:
        """Stop both pulling and awaiting an upload. Pulled leaves stay on the disk."""
        upload.pull = None
        if upload.is_requested:
            self._place.drop(device)
        upload.is_requested = False

    def _request_upload(self, device: str, upload: _Upload, now: float) -> DeviceRequests:
        """Ask a device to upload its update."""
        upload.is_requested, upload.requested_at = True, now
        request = self._place.request_upload(device, upload.ref)
        return [] if request is None else [(device, request)]

    def _switch_to_upload(self, device: str, upload: _Upload, now: float) -> DeviceRequests:
        """Have an update uploaded of which no leaf has been pulled yet."""
        if not (device in self._running or self._place.is_direct):
            return []
        self._waiting.pop(device, None)
        self._stop_transfer(device, upload)
        if self._place.is_direct:
            self._running.discard(device)
        return self._begin_transfer(device, upload, now)

    def _switch_to_pull(self, device: str, upload: _Upload, now: float) -> DeviceRequests:
        """Pull an update that could not be uploaded, in the same place if it has one."""
        self._stop_transfer(device, upload)
        upload.pull_only = True
        if device in self._running:
            return self._begin_transfer(device, upload, now)
        self._queue_up(device)
        return self._start_next(now)

    def _fail_upload(
        self, device: str, reason: str, now: float, kind: FailureKind = FailureKind.MALFORMED
    ) -> DeviceRequests:
        upload, reason_line = self._uploads[device], one_line(reason, 400)
        failure = FailedUpload(device, upload.round, upload.attempt, reason_line, kind.value)
        return self._end_upload(device, failure, now)

    def _end_upload(self, device: str, outcome: Outcome, now: float) -> DeviceRequests:
        self.drop(device)
        self._outcomes.append(outcome)
        return self._start_next(now)

    def _queue_up(self, device: str) -> None:
        self._last_ticket += 1
        self._waiting[device] = self._last_ticket
        if self._all_present or device in self._present_sessions:
            heapq.heappush(self._ready_queue, (self._last_ticket, device))

    def _note_present(self, device: str, session: int | None) -> None:
        if not self._all_present and device not in self._present_sessions and device in self._waiting:
            heapq.heappush(self._ready_queue, (self._waiting[device], device))
        self._present_sessions[device] = session

    def _next_device(self, now: float) -> str | None:
        """The next waiting device that was heard."""
        if not self._all_present and now >= self._all_present_at:
            self._all_present = True
            self._ready_queue = [(ticket, device) for device, ticket in self._waiting.items()]
        while self._ready_queue:
            ticket, device = heapq.heappop(self._ready_queue)
            if self._waiting.get(device) == ticket:
                return device
        return None

    def _start_next(self, now: float) -> DeviceRequests:
        """Give free places to waiting devices; returns the requests to them."""
        requests: DeviceRequests = []
        while len(self._running) < self._concurrent:
            device = self._next_device(now)
            if device is None:
                break
            del self._waiting[device]
            self._running.add(device)
            requests += self._begin_transfer(device, self._uploads[device], now)
        return requests

    def _begin_transfer(self, device: str, upload: _Upload, now: float) -> DeviceRequests:
        """Ask for an update that has its place: to be uploaded if that may succeed, else piece by piece."""
        upload.progressed_at = upload.began_at = now
        if device in self._uploaders and not upload.pull_only and not self._store.has(upload.ref.sha256):
            upload.leaves = upload.leaves_at_start = 0
            return self._request_upload(device, upload, now)
        try:
            response_times = self._response_times.setdefault(device, ResponseTime())
            upload.pull = Pull(upload.ref, self._store.partial(upload.ref), limit=self._limit, answers=response_times)
            upload.leaves = upload.leaves_at_start = upload.pull.progress[0]
            requests = upload.pull.start(now)
        except ProtocolError as error:
            return self._fail_upload(device, str(error), now)
        if upload.pull.is_done:  # the blob was in the store already
            return self._end_upload(device, ArrivedUpdate(device, upload.round, upload.attempt, upload.ref.sha256), now)
        return [(device, request) for request in requests]
