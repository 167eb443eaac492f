"""Sends a job's messages at the end of a turn, and chunks of blobs as fast as the connection accepts them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import CHUNK_QOS, DEFAULT_MAX_PACKET, PACKET_OVERHEAD_BYTES
from fedprune.wire.fields import MAX_MESSAGE_BYTES
from fedprune.wire.fleet_messages import Reconnect, ReleaseOffer
from fedprune.wire.messages import BlobNotFound, BlobRequest, FromServer, Hello, Offer, SecureStep
from fedprune.wire.queues import HIGH_WATER
from fedprune.wire.request_numbers import SeenRequests, with_request_number
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.messaging.transport import SiteLink
from fedprune_server.transfer.downloads import Downloads
from fedprune_server.transfer.uploads import DeviceRequests

# Few, so that messages never wait long behind chunks; the next turn follows at once while chunks can be sent.
_CHUNKS_PER_TURN = 4

# Messages that a device answers, for which it is credited points: its answers must not count as a flood. A `Reconnect`
# that sends no device away is itself the answer to a birth.
_ANSWERED_MESSAGES = (Hello, Offer, SecureStep, Reconnect, ReleaseOffer)


class Outbox:
    """Sends messages and chunks to a job's devices, and counts the bytes. `is_coming` says whether a missing blob will
    arrive from the bucket in a moment."""

    def __init__(
        self,
        site: SiteLink,
        registry: DeviceRegistry,
        downloads: Downloads,
        is_coming: Callable[[str], bool] = lambda sha256: False,
    ) -> None:
        self._link, self._topics, self._quarantine = site.link, site.topics, site.quarantine
        self._clock = site.monotonic
        has_large_packets = site.max_packet >= DEFAULT_MAX_PACKET
        self._max_message_bytes = MAX_MESSAGE_BYTES if has_large_packets else site.max_packet - PACKET_OVERHEAD_BYTES
        self._is_duplicate = SeenRequests().is_duplicate
        self._is_coming = is_coming
        self._registry, self._downloads = registry, downloads
        # Device, topic, payload, and of an offer its round and attempt.
        self._queue: deque[tuple[str, str, bytes, tuple[int, int] | None]] = deque()

    @property
    def has_unsent(self) -> bool:
        return bool(self._downloads) or bool(self._queue)

    @property
    def queued_messages(self) -> int:
        return len(self._queue)

    @property
    def can_send_chunk(self) -> bool:
        """Whether a chunk waits and could be sent now."""
        return bool(self._downloads) and self._link.unsent < HIGH_WATER

    def send(self, device: str, message: FromServer, job: str | None = None) -> None:
        """Queue a message for the next `deliver`; a device asks again for one that is lost. Raises `ProtocolError` if
        it is longer than a message may be, or than the broker lets through.
        """
        payload = message.to_bytes()
        if len(payload) > self._max_message_bytes:
            raise ProtocolError(
                f"{message.kind}: message is too long for the broker",
                expected=f"at most {self._max_message_bytes} bytes",
                got=len(payload),
                hint="Raise the broker's limit and max_packet in [server].",
            )
        topic = self._topics.down(device, job) if job else self._topics.down(device)
        if isinstance(message, _ANSWERED_MESSAGES) and not (isinstance(message, Reconnect) and message.away_s is None):
            self._quarantine.credit_message(device)
        offered_part = (message.round, message.attempt) if isinstance(message, Offer) else None
        self._queue.append((device, topic, payload, offered_part))

    def deliver(self) -> None:
        """Send as many of the queued messages as the connection accepts.

        Without a connection they are dropped: devices ask again. Those to devices that are no longer members are
        dropped, too, so that they don't block the queue.
        """
        while self._queue:
            device, topic, payload, offered_part = self._queue[0]
            if self._link.publish(topic, payload):
                self._registry.count_sent(device, len(payload))
                if offered_part is not None:
                    self._registry.note_offer(device, offered_part, self._clock())
            elif self._link.connected and not self._link.room:
                return  # the connection is busy: the rest follows in a later turn
            self._queue.popleft()

    def broadcast(self, hello: Hello) -> None:
        self._link.publish(self._topics.broadcast(), hello.to_bytes())

    def send_requests(self, requests: DeviceRequests) -> None:
        """Request devices' updates at once, not at the turn's end: a request doesn't depend on saved state."""
        for device, request in requests:
            if isinstance(request, BlobRequest):
                self._quarantine.credit_leaves(device, request.count)
                self._registry.transfers.note_upload_request(device, request)
            self._quarantine.credit_message(device)
            topic, payload = self._topics.down(device), with_request_number(request).to_bytes()
            # Behind messages that are queued already, so that their order stays.
            if not self._queue and self._link.publish(topic, payload):
                self._registry.count_sent(device, len(payload))
            else:
                self._queue.append((device, topic, payload, None))

    def serve_request(self, device: str, request: BlobRequest, allowed_digests: AbstractSet[str]) -> None:
        """Queue the pieces of a blob that a device requests, if it may fetch that blob."""
        if self._is_duplicate(device, request):
            return
        if request.sha256 in allowed_digests:
            self._quarantine.charge_request(device, request.sha256, self._downloads.leaf_count(request.sha256))
            if self._downloads.add(device, request):
                self._registry.transfers.note_download_request(device, request)
        else:
            self.send(device, BlobNotFound(request.sha256))

    def forget(self, device: str) -> None:
        """Drop the requests of a device that has disconnected."""
        self._downloads.drop(device)

    def send_chunks(self) -> None:
        """Send a few of the waiting chunks. Raises `StorageError` if the disk fails."""
        for _ in range(_CHUNKS_PER_TURN):
            item = self._downloads.next_chunk() if self.can_send_chunk else None
            if item is None:
                return
            device, chunk = item
            if isinstance(chunk, BlobNotFound):
                if self._is_coming(chunk.sha256):
                    continue  # the device asks again, and the blob is here by then
                self.send(device, chunk)
                self.deliver()
            elif self._link.publish(self._topics.down_blob(device), chunk, CHUNK_QOS):
                self._registry.count_sent(device, len(chunk))
