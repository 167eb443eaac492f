"""The part of a job that the web server of blobs sees: which blobs a device may fetch, and which updates it may upload.

The server's loop makes one for each job; the web server's threads use it.
"""

from __future__ import annotations

from collections.abc import Callable

from fedprune.blobs.blob_store import BlobStore
from fedprune_server.transfer.upload_place import ByteCounter, UploadPlace
from fedprune_server.transfer.web_uploads import HttpUploads


class ServedJob:
    """The blobs that the devices of a job may fetch and upload.

    Args:
        may_fetch: Whether a device may fetch a blob, given their name and digest; the name is None without
            certificates. Called from any thread.
        place: The place to which devices upload. Only uploads to this server (`HttpUploads`) matter here.
        pulls: Number of uploads that are awaited at a time.
    """

    def __init__(
        self,
        store: BlobStore,
        may_fetch: Callable[[str | None, str], bool],
        place: UploadPlace | None = None,
        pulls: int = 0,
    ) -> None:
        self.store, self.may_fetch = store, may_fetch
        self.uploads = place if isinstance(place, HttpUploads) else None
        self.connections = 0 if self.uploads is None else pulls
        self._sent = ByteCounter()

    def count_sent(self, device: str | None, size: int) -> None:
        """Count bytes that were sent to a device, if it is known which."""
        if device is not None:
            self._sent.add(device, size)

    def take_sent_bytes(self) -> dict[str, int]:
        """Bytes of blobs that were sent to devices since the last call, by device."""
        return self._sent.take_counts()
