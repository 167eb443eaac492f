"""Where boards upload updates, its own web server or a bucket, as the server's loop sees it; bytes counted by board."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.messages import UploadRequest


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
            found, self._bytes = self._bytes, Counter()
        return dict(found)


class UploadPlace(ABC):
    """Where boards upload updates; for the server's loop.

    Attributes:
        direct: Whether uploads don't pass through this server, so that any number may be under way at a time.
    """

    direct = False

    def __init__(self) -> None:
        self._received = ByteCounter()
        self._ends: queue.SimpleQueue[UploadEnd] = queue.SimpleQueue()

    @abstractmethod
    def ask(self, device: str, ref: BlobRef) -> UploadRequest | None:
        """Await an update, and say where the device is to upload it; None if there is nothing to upload, and the end is
        near. An upload that is under way goes on."""

    @abstractmethod
    def drop(self, device: str) -> None:
        """Await a device's update no longer."""

    @abstractmethod
    def reported(self, device: str) -> None:
        """The device reports that it has uploaded its update."""

    @abstractmethod
    def arrived(self, device: str) -> int:
        """Bytes of an awaited update that have arrived, as far as is known."""

    def taken(self) -> dict[str, int]:
        """Bytes that came from devices since the last call."""
        return self._received.taken()

    def ended(self) -> list[UploadEnd]:
        """Uploads that have ended since the last call."""
        found = []
        while not self._ends.empty():
            found.append(self._ends.get())
        return found
