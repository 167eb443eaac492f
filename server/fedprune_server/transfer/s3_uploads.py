"""Updates that boards upload to the bucket itself: addresses for them, and what is verified of them."""

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

EXPIRES_S = 900
"""How long an address may be used to begin an upload."""

_LATE_S = 2 * EXPIRES_S
"""After this time an upload that is no longer awaited is deleted from the bucket. The next start deletes later ones."""

_ANY = BlobRef.of(b"")


@dataclass
class _Awaited:
    ref: BlobRef
    keys: list[str] = field(default_factory=list)
    """Of the objects that the device has an address for."""
    request: UploadRequest | None = None
    until: float = 0.0
    """When the request's address is too old to be given again: half its life is left to use it."""


class S3Uploads(UploadPlace):
    """Updates that devices put into the bucket of a job, with an address that is signed for each.

    Raises:
        ConfigError: The job has no bucket, or boards could not use its addresses.
    """

    takes = direct = True

    def __init__(self, shipping: BucketSync, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._shipping, self._store, self._clock = shipping, shipping.store, clock
        self._awaited: dict[str, _Awaited] = {}
        self._unused: deque[tuple[float, str]] = deque()
        example = self._store.url_for(_ANY, EXPIRES_S)
        if example is None:
            raise ConfigError(("server", "uploads"), expected="blobs = 's3://...' for every job", got="'s3'")
        try:
            UploadUrl.parse(example[1])
        except ProtocolError as error:
            raise ConfigError(
                ("server", "uploads"), expected="a bucket at https://", got=repr(example[1].partition("?")[0]),
                hint="Boards upload to that address: give AWS_ENDPOINT_URL with https.",
            ) from error  # fmt: skip

    def ask(self, device: str, ref: BlobRef) -> UploadRequest | None:
        known = self._awaited.get(device)
        if known is None or known.ref != ref:
            known = self._awaited[device] = _Awaited(ref)
        if self._shipping.verifies(device, ref):
            return None
        if self._store.has(ref.sha256):  # put there for an earlier process of the server
            self._shipping.adopt(device, ref)
            return None
        if known.request is not None and self._clock() < known.until:
            return known.request  # a board that has uploaded to it reports that again
        try:
            target = self._store.url_for(ref, EXPIRES_S)
        except BucketError as error:
            log.warning("updates are pulled over MQTT: %s", error)
            target = None
        if target is None:
            self._ends.put(UploadEnd(device, ref, stored=False))
            return None
        key, url = target
        known.keys.append(key)
        known.request, known.until = UploadRequest(ref.sha256, url), self._clock() + EXPIRES_S / 2
        return known.request

    def drop(self, device: str) -> None:
        """A device's update is awaited no longer; what it may still upload is deleted later."""
        known = self._awaited.pop(device, None)
        if known is not None:
            self._unused.extend((self._clock() + _LATE_S, key) for key in known.keys)

    def reported(self, device: str) -> None:
        known = self._awaited.get(device)
        if known is not None:
            self._shipping.adopt(device, known.ref, known.keys)

    def ended(self) -> list[UploadEnd]:
        found = super().ended()
        for adoption, right in self._shipping.adopted():
            found.append(UploadEnd(adoption.device, adoption.ref, right))
            if right:
                self._received.add(adoption.device, adoption.ref.size)
        while self._unused and self._unused[0][0] <= self._clock():
            self._store.clear([self._unused.popleft()[1]])
        return found
