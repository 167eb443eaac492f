"""Sends blobs to devices, one chunk per device in turn, so that no device waits behind another one's whole model."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, HEADER_STRUCT
from fedprune.wire.messages import BlobNotFound, BlobRequest

# Maximum number of devices that are answered in turn while others wait: each answer takes the memory of a chunk.
_MAX_CONCURRENT_ANSWERS = 32

# Maximum number of queued requests of one device. Others are dropped, and the device sends them again.
MAX_QUEUED_REQUESTS = 64


@dataclass(eq=False)
class _Answer:
    """The answer to a request, of which `sent_leaves` leaves have been sent."""

    request: BlobRequest
    chunks: Iterator[bytes]
    sent_leaves: int = 0

    def next_chunk(self) -> bytes | None:
        chunk = next(self.chunks, None)
        if chunk is not None:
            self.sent_leaves += -(-(len(chunk) - HEADER_STRUCT.size) // LEAF_BYTES)
        return chunk

    def uncovered_part(self, request: BlobRequest) -> BlobRequest | None:
        """The part of a request that this answer won't send; None if it sends everything."""
        answered = self.request
        next_leaf, end_leaf = answered.first + self.sent_leaves, answered.first + answered.count
        is_same_blob = (answered.sha256, answered.part, answered.most) == (request.sha256, request.part, request.most)
        if not is_same_blob or not next_leaf < request.first + request.count <= end_leaf:
            return request
        return replace(request, count=next_leaf - request.first) if request.first < next_leaf else None


class Downloads:
    """Interleaves the answers to devices' blob requests. Does no network I/O. `max_packet` is the size of an MQTT
    packet that the broker lets through."""

    def __init__(self, serve: BlobSender, max_packet: int = DEFAULT_MAX_PACKET) -> None:
        self._sender = serve
        self._max_packet = max_packet
        self._queued: OrderedDict[str, deque[BlobRequest]] = OrderedDict()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether a chunk or an answer is still to be sent."""
        return bool(self._queued) or bool(self._answers)

    def add(self, device: str, request: BlobRequest) -> bool:
        """Queue a request, unless it is queued already; returns whether it was. A device also repeats a request while
        its answer waits for a slow connection: leaves that this answer will still send aren't queued a second time."""
        request = replace(request, number=None)  # the same pieces, asked for again
        current = self._answers.get(device)
        uncovered = request if current is None else current.uncovered_part(request)
        if uncovered is None:
            return False
        waiting = self._queued.setdefault(device, deque())
        is_new = uncovered not in waiting and len(waiting) < MAX_QUEUED_REQUESTS
        if is_new:
            waiting.append(uncovered)
        return is_new

    def leaf_count(self, sha256: str) -> int:
        """Number of a blob's leaves; 0 if the blob isn't here."""
        return self._sender.leaf_count(sha256)

    def drop(self, device: str) -> None:
        """Drop a device's requests."""
        self._queued.pop(device, None)
        self._answers.pop(device, None)

    def next_chunk(self) -> tuple[str, bytes | BlobNotFound] | None:
        """The next chunk to send, with its device; `BlobNotFound` for a blob that isn't here. Raises `StorageError` if
        the disk fails."""
        while True:
            while self._queued and len(self._answers) < _MAX_CONCURRENT_ANSWERS:
                device = next((name for name in self._queued if name not in self._answers), None)
                if device is None:
                    break
                waiting = self._queued.pop(device)
                request = waiting.popleft()
                if waiting:  # the device then queues behind all others
                    self._queued[device] = waiting
                answer = self._sender.answer(request, self._max_packet)
                if isinstance(answer, BlobNotFound):
                    return device, answer
                self._answers[device] = _Answer(request, iter(answer))
            if not self._answers:
                return None
            device, current = next(iter(self._answers.items()))
            self._answers.move_to_end(device)
            chunk = current.next_chunk()
            if chunk is not None:
                return device, chunk
            del self._answers[device]
