"""Fetches devices' updates: a few at a time are pulled over MQTT or uploaded to a web server; the others wait for their
turn."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass

from fedprune.blobs.blob_ref import LEAF, BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import FailureKind
from fedprune.wire.chunk import MAX_PACKET, Chunk, ChunkLimit
from fedprune.wire.messages import BlobRequest, UploadRequest, UploadResult
from fedprune.wire.transfer import LEAST_BYTES_PER_S, Pull, ResponseTime
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.upload_place import Arrived, FailedUpload, Outcome, UploadPlace

log = logging.getLogger("fedprune.server")

# Seconds without a byte after which a transfer gives its place to a waiting one. So does a transfer that has had its
# place for so long and was slower than `LEAST_BYTES_PER_S` on average.
STALLED_S = 30.0

# Seconds after a request to upload in which an announcement counts as sent before the request came. A device that
# announces its update later hasn't got the request, and gets it again.
ASK_AGAIN_S = 5.0

LOST = "the device no longer has the update that it announced"


Wants = list[tuple[str, BlobRequest | UploadRequest]]


@dataclass
class _Upload:
    """An update on its way. It is in one of three states: pulled over MQTT, requested from the device as an upload, or
    else waiting for a place.

    Attributes:
        pull: The transfer over MQTT; None in the other states.
        put: Whether the device was asked to upload the update; False in the other states.
        asked_at: Time of that request.
        mqtt: Whether an upload has failed or was too slow, so that the update is only pulled from now on.
        leaves: Leaves that have arrived.
        moved_at: Time at which the last leaf arrived.
        began_at: Time at which the update got its place.
        began_with: Leaves that had arrived then.
    """

    round: int
    attempt: int
    ref: BlobRef
    pull: Pull | None = None
    put: bool = False
    asked_at: float = 0.0
    mqtt: bool = False
    leaves: int = 0
    moved_at: float = 0.0
    began_at: float = 0.0
    began_with: int = 0

    def slow(self, now: float) -> bool:
        """Whether nothing has arrived for a while, or too little since it got its place."""
        seconds = now - self.began_at
        received_bytes = (self.leaves - self.began_with) * LEAF
        return now - self.moved_at > STALLED_S or (seconds > STALLED_S and received_bytes < LEAST_BYTES_PER_S * seconds)


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
        max_packet: int = MAX_PACKET,
        place: UploadPlace | None = None,
    ) -> None:
        self._limit = ChunkLimit(max_packet)
        self._sync, self._store = sync, sync.near
        self._concurrent = concurrent
        self._place = place or UploadPlace()
        self._can_put: set[str] = set()
        self._uploads: dict[str, _Upload] = {}
        self._answers: dict[str, ResponseTime] = {}
        # Devices heard since the server's last reconnection, with their connections. Others get no place: their
        # requests would be lost. After `_all_there_at` all devices count as heard.
        self._there: dict[str, int | None] = {}
        self._all_there, self._all_there_at = True, 0.0
        self._tickets = 0
        self._waiting: dict[str, int] = {}  # tickets of waiting devices, which get their places in this order
        # A heap of the waiting devices that were heard. Entries of devices that no longer wait are skipped when they
        # come up, which is cheaper than to remove them.
        self._ready: list[tuple[int, str]] = []
        self._running: set[str] = set()
        self._outcomes: list[Outcome] = []

    def add(self, device: str, round_: int, attempt: int, ref: BlobRef, now: float) -> Wants:
        """Fetch an update. A repeated call for the one under way changes nothing. Raises `StorageError` if the store
        fails."""
        if not self.fetching(device, round_, attempt, ref):
            previous = self._uploads.get(device)
            self.drop(device)
            if previous is not None and (previous.round, previous.attempt) == (round_, attempt):
                # A device that announces one update after another for the same part must not fill the disk with pieces.
                self._drop_partial(previous.ref.sha256)
            upload = self._uploads[device] = _Upload(round_, attempt, ref)
            if self._place.direct and device in self._can_put:
                return self._begin(device, upload, now) + self.heard(device, now)
            self._wait(device)
        return self.heard(device, now)

    def heard(self, device: str, now: float) -> Wants:
        """Handle a device's announcement of its update, which shows that the device is connected."""
        if device not in self._there:
            self._shows(device, None)
        upload = self._uploads.get(device)
        repeated_request: Wants = []
        if upload is not None and upload.put and now - max(upload.asked_at, upload.moved_at) > ASK_AGAIN_S:
            repeated_request = self._ask(device, upload, now)
        return repeated_request + self._start(now)

    def reported(self, device: str, result: UploadResult, now: float) -> Wants:
        """Handle a device's report on the end of its upload. A failed one is pulled."""
        requests = self.collect(now)
        upload = self._uploads.get(device)
        if upload is None or not upload.put or upload.ref.sha256 != result.sha256:
            return requests
        if result.reason is None:
            self._place.reported(device)
            return requests + self.collect(now)
        log.debug("device %s can't upload its update, which is pulled: %s", device, one_line(result.reason))
        return requests + self._pull_instead(device, upload, now)

    def collect(self, now: float) -> Wants:
        """Handle the uploads that have ended. Raises `StorageError` if the store fails."""
        requests: Wants = []
        for end in self._place.ended():
            upload = self._uploads.get(end.device)
            if upload is None or upload.ref != end.ref:
                continue
            if end.stored:
                arrived = Arrived(end.device, upload.round, upload.attempt, upload.ref.sha256)
                requests += self._end(end.device, arrived, now)
            elif upload.put:
                requests += self._pull_instead(end.device, upload, now)
        return requests

    def chunk(self, device: str, chunk: Chunk, now: float) -> Wants:
        """Handle a chunk from a device. A chunk that no transfer awaits is ignored. Raises `StorageError` if the store
        fails."""
        upload = self._uploads.get(device)
        if upload is None or upload.pull is None or chunk.sha256 != upload.ref.sha256:
            return []
        try:
            requests = upload.pull.on_chunk(chunk, now)
        except ProtocolError as error:
            return self._fail(device, str(error), now)
        if upload.pull.done:
            return self._end(device, Arrived(device, upload.round, upload.attempt, upload.ref.sha256), now)
        leaves = upload.pull.progress[0]
        if leaves != upload.leaves:
            upload.leaves, upload.moved_at = leaves, now
        return [(device, request) for request in requests]

    def gone(self, device: str, sha256: str, now: float) -> Wants:
        """Handle a device's answer that it no longer has the update that it announced."""
        upload = self._uploads.get(device)
        if upload is None or upload.ref.sha256 != sha256:
            return []
        return self._fail(device, LOST, now, FailureKind.GONE)

    def tick(self, now: float) -> Wants:
        """Repeat overdue requests, and let waiting updates take the places of stuck or slow ones."""
        for device in self._running:
            upload = self._uploads[device]
            if upload.put:
                leaves = self._place.arrived(device) // LEAF
                if leaves != upload.leaves:
                    upload.leaves, upload.moved_at = leaves, now
        slow_devices = [name for name in self._running if self._uploads[name].slow(now)]
        for device in sorted(slow_devices) if self._waiting else ():
            upload = self._uploads[device]
            upload.mqtt = upload.mqtt or upload.put  # another upload would begin at the first byte; a pull continues
            self._stop(device, upload)
            self._running.discard(device)
            self._wait(device)
        requests: Wants = []
        for device in sorted(self._running):
            upload = self._uploads[device]
            if upload.pull is None:
                continue
            try:
                requests += [(device, request) for request in upload.pull.on_tick(now)]
            except ProtocolError as error:
                requests += self._fail(device, str(error), now)
        return requests + self._start(now)

    def interrupted(self, now: float) -> None:
        """Begin anew after the server's reconnection: chunks under way are lost, and devices are there again once they
        announce themselves.

        Until then they get no requests and no place: after the broker's restart they come back one by one.
        """
        self._all_there, self._all_there_at = False, now + STALLED_S
        self._there.clear()
        self._ready.clear()
        pulled = [name for name in sorted(self._running) if not self._uploads[name].put]
        for device in pulled:
            upload = self._uploads[device]
            if upload.pull is not None:
                upload.pull.give_up()
            self._stop(device, upload)
        waiting = [*pulled, *self._waiting]
        self._waiting.clear()
        for device in waiting:
            self._wait(device)
        self._running.difference_update(pulled)

    def born(self, device: str, session: int, response_s: float, now: float, *, uploads: bool = False) -> Wants:
        """Handle a device's birth. On a new connection the chunks under way are lost, and requested again.

        Args:
            session: Number of its connection.
            response_s: Seconds until answers come, as measured by the device.
            uploads: Whether it can upload to a web server.
        """
        self._answers.setdefault(device, ResponseTime()).told(response_s)
        uploads = uploads and self._place.takes
        is_new_uploader = uploads and device not in self._can_put
        (self._can_put.add if uploads else self._can_put.discard)(device)
        previous_session = self._there.get(device)
        self._shows(device, session)
        upload = self._uploads.get(device)
        requests: Wants = []
        if is_new_uploader and upload is not None and not (upload.put or upload.leaves):
            # Its first requests left before it was known that it can upload.
            return self._put_instead(device, upload, now) + self._start(now)
        if upload is not None and upload.put and not uploads:
            return self._pull_instead(device, upload, now) + self._start(now)
        if upload is not None and previous_session not in (None, session) and (upload.put or upload.pull is not None):
            upload.moved_at = upload.began_at = now  # the request went to its earlier connection
            upload.began_with = upload.leaves
            if upload.pull is None:
                requests = self._ask(device, upload, now)
            else:
                requests = [(device, request) for request in upload.pull.start(now)]
        return requests + self._start(now)

    def drop(self, device: str) -> list[str]:
        """Stop fetching from a device. Arrived leaves stay on the disk, from which a later transfer continues.

        Returns:
            Digests of the dropped updates.
        """
        upload = self._uploads.pop(device, None)
        if upload is None:
            return []
        self._waiting.pop(device, None)
        self._running.discard(device)
        if upload.pull is not None:
            # The device may be gone because of our request: brokers end the connection of a client whose chunk is too
            # large. `give_up` counts against the size of chunks.
            upload.pull.give_up()
        self._stop(device, upload)
        return [upload.ref.sha256]

    def _drop_partial(self, sha256: str) -> None:
        if all(upload.ref.sha256 != sha256 for upload in self._uploads.values()):
            self._store.drop_partial(sha256)

    def keep(self, device: str, round_: int, attempt: int) -> list[str]:
        """Stop fetching from a device, unless the update is for this part of a round.

        Returns:
            Digests of the dropped updates.
        """
        upload = self._uploads.get(device)
        return [] if upload is None or (upload.round, upload.attempt) == (round_, attempt) else self.drop(device)

    def fetching(self, device: str, round_: int, attempt: int, ref: BlobRef) -> bool:
        """Whether this very update is being fetched, or waits to be."""
        upload = self._uploads.get(device)
        return upload is not None and (upload.round, upload.attempt, upload.ref) == (round_, attempt, ref)

    def devices(self) -> list[str]:
        """Devices whose updates are being fetched, or wait for it."""
        return list(self._uploads)

    def digests(self) -> set[str]:
        """Digests of updates that are being fetched, wait for it, or are being copied into the bucket."""
        return {u.ref.sha256 for u in self._uploads.values()} | self._sync.digests

    def outcomes(self) -> list[Outcome]:
        """Outcomes since the last call, of updates only once the job's store has them. Raises `StorageError` if the
        store fails."""
        ended, self._outcomes = self._outcomes, []
        return self._sync.through(ended)

    def taken(self) -> dict[str, int]:
        """Bytes that devices have uploaded since the last call."""
        return self._place.taken()

    def progress(self, device: str) -> tuple[int, int] | None:
        """Arrived leaves and all leaves of a device's update; None if none is being fetched."""
        upload = self._uploads.get(device)
        if upload is not None and upload.put:
            return upload.leaves, upload.ref.leaf_count
        return None if upload is None or upload.pull is None else upload.pull.progress

    def _stop(self, device: str, upload: _Upload) -> None:
        """Stop both pulling and awaiting an upload. Pulled leaves stay on the disk."""
        upload.pull = None
        if upload.put:
            self._place.drop(device)
        upload.put = False

    def _ask(self, device: str, upload: _Upload, now: float) -> Wants:
        """Ask a device to upload its update."""
        upload.put, upload.asked_at = True, now
        request = self._place.ask(device, upload.ref)
        return [] if request is None else [(device, request)]

    def _put_instead(self, device: str, upload: _Upload, now: float) -> Wants:
        """Have an update uploaded of which no leaf has been pulled yet."""
        if not (device in self._running or self._place.direct):
            return []
        self._waiting.pop(device, None)
        self._stop(device, upload)
        if self._place.direct:
            self._running.discard(device)
        return self._begin(device, upload, now)

    def _pull_instead(self, device: str, upload: _Upload, now: float) -> Wants:
        """Pull an update that could not be uploaded, in the same place if it has one."""
        self._stop(device, upload)
        upload.mqtt = True
        if device in self._running:
            return self._begin(device, upload, now)
        self._wait(device)
        return self._start(now)

    def _fail(self, device: str, reason: str, now: float, kind: FailureKind = FailureKind.MALFORMED) -> Wants:
        upload, reason_line = self._uploads[device], one_line(reason, 400)
        return self._end(device, FailedUpload(device, upload.round, upload.attempt, reason_line, kind.value), now)

    def _end(self, device: str, outcome: Outcome, now: float) -> Wants:
        self.drop(device)
        self._outcomes.append(outcome)
        return self._start(now)

    def _wait(self, device: str) -> None:
        self._tickets += 1
        self._waiting[device] = self._tickets
        if self._all_there or device in self._there:
            heapq.heappush(self._ready, (self._tickets, device))

    def _shows(self, device: str, session: int | None) -> None:
        if not self._all_there and device not in self._there and device in self._waiting:
            heapq.heappush(self._ready, (self._waiting[device], device))
        self._there[device] = session

    def _next(self, now: float) -> str | None:
        """The next waiting device that was heard."""
        if not self._all_there and now >= self._all_there_at:
            self._all_there = True
            self._ready = [(ticket, device) for device, ticket in self._waiting.items()]
        while self._ready:
            ticket, device = heapq.heappop(self._ready)
            if self._waiting.get(device) == ticket:
                return device
        return None

    def _start(self, now: float) -> Wants:
        """Give free places to waiting devices; returns the requests to them."""
        requests: Wants = []
        while len(self._running) < self._concurrent:
            device = self._next(now)
            if device is None:
                break
            del self._waiting[device]
            self._running.add(device)
            requests += self._begin(device, self._uploads[device], now)
        return requests

    def _begin(self, device: str, upload: _Upload, now: float) -> Wants:
        """Ask for an update that has its place: to be uploaded if that may succeed, else piece by piece."""
        upload.moved_at = upload.began_at = now
        if device in self._can_put and not upload.mqtt and not self._store.has(upload.ref.sha256):
            upload.leaves = upload.began_with = 0
            return self._ask(device, upload, now)
        try:
            response_times = self._answers.setdefault(device, ResponseTime())
            upload.pull = Pull(upload.ref, self._store.partial(upload.ref), limit=self._limit, answers=response_times)
            upload.leaves = upload.began_with = upload.pull.progress[0]
            requests = upload.pull.start(now)
        except ProtocolError as error:
            return self._fail(device, str(error), now)
        if upload.pull.done:  # the blob was in the store already
            return self._end(device, Arrived(device, upload.round, upload.attempt, upload.ref.sha256), now)
        return [(device, request) for request in requests]
