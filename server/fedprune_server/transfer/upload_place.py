"""Where boards upload updates, as the server's loop sees it: its own web server or a bucket."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.wire.messages import UploadRequest


@dataclass(frozen=True)
class UploadEnd:
    """The end of an upload: the update is stored, or has to be pulled over MQTT."""

    device: str
    ref: BlobRef
    stored: bool


class UploadPlace(ABC):
    """Where boards upload updates; for the server's loop.

    Attributes:
        direct: Whether uploads don't pass through this server, so that any number may be under way at a time.
    """

    direct = False

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

    @abstractmethod
    def taken(self) -> dict[str, int]:
        """Bytes that came from devices since the last call."""

    @abstractmethod
    def ended(self) -> list[UploadEnd]:
        """Uploads that have ended since the last call."""
