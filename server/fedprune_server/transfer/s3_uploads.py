"""Updates that boards upload straight into the S3 bucket: a signed URL for each, and removal of late ones."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.wire.messages import UploadRequest
from fedprune.wire.urls import UploadUrl
from fedprune_server.storage.s3.bucket import BucketError
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.upload_place import UploadEnd, UploadPlace

log = logging.getLogger("fedprune.server")

# Seconds for which an address may be used to begin an upload.
URL_LIFETIME_S = 900

# Seconds after which an upload that is no longer awaited is deleted from the bucket: twice the address's life, so that
# one that began at its end has ended. The next start deletes later ones.
_LATE_UPLOAD_S = 2 * URL_LIFETIME_S

_EXAMPLE = BlobRef.of(b"")


@dataclass
class _AwaitedObject:
    ref: BlobRef
    keys: list[str] = field(default_factory=list)  # of the objects for which the device has addresses
    request: UploadRequest | None = None
    reusable_until: float = 0.0  # until when the address may be given again: half of its life must be left to use it


class S3Uploads(UploadPlace):
    """Updates that devices put into the bucket of a job, with an address that is signed for each. Raises `ConfigError`
    if the job has no bucket, or boards could not use its addresses."""

    accepts_uploads = is_direct = True

    def __init__(self, bucket_sync: BucketSync, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._bucket_sync, self._store, self._clock = bucket_sync, bucket_sync.store, clock
        self._awaited: dict[str, _AwaitedObject] = {}
        self._keys_to_delete: deque[tuple[float, str]] = deque()
        example = self._store.url_for(_EXAMPLE, URL_LIFETIME_S)
        if example is None:
            raise ConfigError(("server", "uploads"), expected="blobs = 's3://...' for every job", got="'s3'")
        try:
            UploadUrl.parse(example[1])
        except ProtocolError as error:
            raise ConfigError(
                ("server", "uploads"), expected="a bucket at https://", got=repr(example[1].partition("?")[0]),
                hint="Boards upload to that address: give AWS_ENDPOINT_URL with https.",
            ) from error  # fmt: skip

    def request_upload(self, device: str, ref: BlobRef) -> UploadRequest | None:
        awaited = self._awaited.get(device)
        if awaited is None or awaited.ref != ref:
            awaited = self._awaited[device] = _AwaitedObject(ref)
        if self._bucket_sync.is_verifying(device, ref):
            return None
        if self._store.has(ref.sha256):  # uploaded for an earlier run of the server
            self._bucket_sync.adopt(device, ref)
            return None
        if awaited.request is not None and self._clock() < awaited.reusable_until:
            return awaited.request  # the same one: a board that has used it only repeats its report
        try:
            target = self._store.url_for(ref, URL_LIFETIME_S)
        except BucketError as error:
            log.warning("updates are pulled over MQTT: %s", error)
            target = None
        if target is None:
            self._ends.put(UploadEnd(device, ref, stored=False))
            return None
        key, url = target
        awaited.keys.append(key)
        awaited.request, awaited.reusable_until = UploadRequest(ref.sha256, url), self._clock() + URL_LIFETIME_S / 2
        return awaited.request

    def drop(self, device: str) -> None:
        """Await a device's update no longer. Objects that it may still upload are deleted later."""
        awaited = self._awaited.pop(device, None)
        if awaited is not None:
            self._keys_to_delete.extend((self._clock() + _LATE_UPLOAD_S, key) for key in awaited.keys)

    def on_report(self, device: str) -> None:
        awaited = self._awaited.get(device)
        if awaited is not None:
            self._bucket_sync.adopt(device, awaited.ref, awaited.keys)

    def take_ended(self) -> list[UploadEnd]:
        ends = super().take_ended()
        for adoption, is_right in self._bucket_sync.take_adopted():
            ends.append(UploadEnd(adoption.device, adoption.ref, is_right))
            if is_right:
                self._received.add(adoption.device, adoption.ref.size)
        while self._keys_to_delete and self._keys_to_delete[0][0] <= self._clock():
            self._store.delete_objects([self._keys_to_delete.popleft()[1]])
        return ends
