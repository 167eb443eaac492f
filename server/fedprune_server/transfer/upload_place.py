"""Where boards upload updates, as the server's loop sees it, and how updates end; bytes counted by board."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.messages import UploadRequest


@dataclass(frozen=True)
class Arrived:
    """An update's weights are whole, verified and in the store."""

    device: str
    round: int
    attempt: int
    weights: str


@dataclass(frozen=True)
class FailedUpload:
    """An update can't be had."""

    device: str
    round: int
    attempt: int
    reason: str
    failure: str


Outcome = Arrived | FailedUpload


@dataclass(frozen=True)
class UploadEnd:
    """The end of an upload: the update is stored, or has to be pulled over MQTT."""

    device: str
    ref: BlobRef
    stored: bool


class ByteCounter:
    """Bytes that devices sent or received; counted in any thread, taken by the server's loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()

    def add(self, device: str, size: int) -> None:
        with self._lock:
            self._bytes[device] += size

    def taken(self) -> dict[str, int]:
        """Bytes by device since the last call."""
        with self._lock:
            counts, self._bytes = self._bytes, Counter()
        return dict(counts)


class UploadPlace:
    """Where boards upload updates; for the server's loop. This one is nowhere: all updates are pulled over MQTT.

    Attributes:
        takes: Whether boards can upload there.
        direct: Whether uploads don't pass through this server, so that any number may be under way at a time.
    """

    takes = direct = False

    def __init__(self) -> None:
        self._received = ByteCounter()
        self._ends: queue.SimpleQueue[UploadEnd] = queue.SimpleQueue()

    def ask(self, device: str, ref: BlobRef) -> UploadRequest | None:
        """Await an update, and say where the device is to upload it; None if there is nothing to upload, and the end is
        near. An upload that is under way goes on."""
        return None

    def drop(self, device: str) -> None:
        """Await a device's update no longer."""

    def reported(self, device: str) -> None:
        """The device reports that it has uploaded its update."""

    def arrived(self, device: str) -> int:
        """Bytes of an awaited update that have arrived, as far as is known."""
        return 0

    def taken(self) -> dict[str, int]:
        """Bytes that came from devices since the last call."""
        return self._received.taken()

    def ended(self) -> list[UploadEnd]:
        """Uploads that have ended since the last call."""
        ends = []
        while not self._ends.empty():
            ends.append(self._ends.get())
        return ends
