"""Updates that boards upload to this server over HTTP.

The server's loop awaits an update and collects its end; the web server's threads look up awaited updates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.wire.messages import UploadRequest
from fedprune.wire.urls import BlobUrl
from fedprune_server.process.web_server import WebClient
from fedprune_server.transfer.upload_place import UploadEnd, UploadPlace


@dataclass(eq=False)
class AwaitedUpload:
    """An update that a device is to upload. Its connection is the latest one that has begun to upload it."""

    device: str
    ref: BlobRef
    connection: WebClient | None = None
    arrived_bytes: int = 0


class HttpUploads(UploadPlace):
    """Updates that boards upload to the server's own web server. When one has ended, `wake` wakes the server's loop,
    from any thread."""

    accepts_uploads = True

    def __init__(self, store: BlobStore, url: str, wake: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.store = store
        self._url, self._wake = BlobUrl.parse(url), wake
        self._lock = threading.Lock()
        self._awaited: dict[str, AwaitedUpload] = {}

    def request_upload(self, device: str, ref: BlobRef) -> UploadRequest:
        with self._lock:
            awaited = self._awaited.get(device)
            if awaited is None or awaited.ref != ref:
                self._awaited[device] = AwaitedUpload(device, ref)
        return UploadRequest(ref.sha256, f"{self._url}/{ref.sha256[:2]}/{ref.sha256}")

    def drop(self, device: str) -> None:
        with self._lock:
            awaited = self._awaited.pop(device, None)
        if awaited is not None and awaited.connection is not None:
            awaited.connection.cut()

    def on_report(self, device: str) -> None:
        """Handle a reported success that isn't here: the upload went to another server, so pull the update instead."""
        awaited = self._awaited.get(device)
        if awaited is not None:
            self._ends.put(UploadEnd(device, awaited.ref, stored=False))

    def arrived_bytes(self, device: str) -> int:
        awaited = self._awaited.get(device)
        return 0 if awaited is None else awaited.arrived_bytes

    # For the web server's threads.

    def find_awaited(self, device: str | None, sha256: str) -> AwaitedUpload | None:
        """The awaited update with this digest of a device, or, without certificates, of any device."""
        with self._lock:
            candidates = list(self._awaited.values()) if device is None else [self._awaited.get(device)]
        return next((a for a in candidates if a is not None and a.ref.sha256 == sha256), None)

    def begin_upload(self, awaited: AwaitedUpload, connection: WebClient) -> None:
        """Note that a connection uploads from the first byte. An earlier connection that did is cut."""
        with self._lock:
            previous_connection, awaited.connection, awaited.arrived_bytes = awaited.connection, connection, 0
        if previous_connection is not None and previous_connection is not connection:
            previous_connection.cut()

    def note_progress(self, awaited: AwaitedUpload, connection: WebClient, arrived: int) -> bool:
        """Note the bytes that have arrived on a connection; returns whether it may go on."""
        with self._lock:
            if awaited.connection is connection:
                self._received.add(awaited.device, arrived - awaited.arrived_bytes)
            if self._awaited.get(awaited.device) is not awaited or awaited.connection is not connection:
                return False
            awaited.arrived_bytes = arrived
            return True

    def end_upload(self, awaited: AwaitedUpload, *, stored: bool) -> None:
        """Note that an update is stored, or was wrong. It isn't awaited again until the loop decides so."""
        with self._lock:
            if self._awaited.get(awaited.device) is awaited:
                del self._awaited[awaited.device]
        self._ends.put(UploadEnd(awaited.device, awaited.ref, stored))
        self._wake()
