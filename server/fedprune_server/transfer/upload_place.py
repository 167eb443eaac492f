"""The place to which boards upload updates, as the server's loop sees it, and the outcomes of updates."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.messages import UploadRequest


@dataclass(frozen=True)
class ArrivedUpdate:
    """The weights of an update are complete, verified and in the store."""

    device: str
    round: int
    attempt: int
    weights: str


@dataclass(frozen=True)
class FailedUpload:
    """An update can't be received: `reason` in words, `failure` as a value of `FailureKind`."""

    device: str
    round: int
    attempt: int
    reason: str
    failure: str


Outcome = ArrivedUpdate | FailedUpload


@dataclass(frozen=True)
class UploadEnd:
    """The end of an upload: the update is stored, or must be pulled over MQTT."""

    device: str
    ref: BlobRef
    stored: bool


class ByteCounter:
    """Counts the bytes that devices send or receive, on any thread, until the server's loop takes the counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()

    def add(self, device: str, size: int) -> None:
        with self._lock:
            self._bytes[device] += size

    def take_counts(self) -> dict[str, int]:
        """Bytes by device since the last call."""
        with self._lock:
            counts, self._bytes = self._bytes, Counter()
        return dict(counts)


class UploadPlace:
    """A place to which boards upload updates, for the server's loop. This base accepts no uploads: the server pulls all
    updates over MQTT.

    Uploads that are `is_direct` bypass this server, so that any number may be under way at a time."""

    accepts_uploads = is_direct = False

    def __init__(self) -> None:
        self._received = ByteCounter()
        self._ends: queue.SimpleQueue[UploadEnd] = queue.SimpleQueue()

    def request_upload(self, device: str, ref: BlobRef) -> UploadRequest | None:
        """Await an update; returns the request with its address. None if there is nothing to upload, because its end
        follows at once. An upload that is under way goes on."""
        return None

    def drop(self, device: str) -> None:
        """Await a device's update no longer."""

    def on_report(self, device: str) -> None:
        """Handle a device's report that it has uploaded its update."""

    def arrived_bytes(self, device: str) -> int:
        """Known number of bytes of an awaited update that have arrived."""
        return 0

    def take_byte_counts(self) -> dict[str, int]:
        """Bytes that devices have uploaded since the last call, by device."""
        return self._received.take_counts()

    def take_ended(self) -> list[UploadEnd]:
        """Uploads that have ended since the last call."""
        ends = []
        while not self._ends.empty():
            ends.append(self._ends.get())
        return ends
