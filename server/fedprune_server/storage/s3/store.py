"""A blob store in a bucket, with a folder as its cache.

A blob is stored once the bucket has it. Objects are named by digest and a random text, and no name is used twice. So a
late deletion, such as that of a server that has lost its job meanwhile, hits nothing that was put later, even if it has
the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedprune.blobs.blob_ref import TABLE_SUFFIX, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore, BucketObjects, MissingBlobError
from fedprune.blobs.partial_blob import process_name
from fedprune.blobs.streamed_blob import StreamedBlob
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, ProtocolError, StorageError, StorageFullError
from fedprune.core.records import decode_record, encode_record
from fedprune.core.validation import is_digest
from fedprune_server.storage.s3.bucket import (
    BLOBS_PREFIX,
    MAX_OWNER_BYTES,
    MODEL_KEY,
    OWNER_KEY,
    Bucket,
    Owner,
    digest_of,
)
from fedprune_server.storage.s3.retry_policy import ADOPT_WORK, WRITE_WORK, Deletions, RetryPolicy

log = logging.getLogger("fedprune.server")

# Seconds for which a used blob stays in the folder, whatever its size: a device is about to request the rest of it.
RECENT_USE_S = 60.0

_MAX_MODEL_BYTES = 2**31

_Result = TypeVar("_Result")
_CACHE_PREFIX = "fedprune-blobs-"


class BucketStore(BlobStore):
    """Blobs in a bucket. Methods raise `BucketError` if the bucket can't be used.

    A blob that isn't in the folder is fetched when it is read, and verified before it is stored there. `put` returns
    when the bucket has the blob; `delete` returns at once, and objects are deleted in the background.

    Args:
        cache: Maximum bytes of the bucket's blobs that the folder holds.
        shared: Whether other processes store blobs in the bucket, too: then each blob is searched for in the bucket,
            whose objects aren't listed at first.
        caching: Whether fetched blobs are cached in the folder; readers leave it unchanged.

    Attributes:
        retry: Retries calls while the bucket can't be used; at first it doesn't.
    """

    def __init__(self, root: Path, url: str, *, cache: int = 2**62, caching: bool = True, shared: bool = False) -> None:
        super().__init__(root)
        self.bucket = Bucket(url)
        self.cache = cache
        self._caches = caching
        self._shared = shared
        self._evicts = True
        self._make_connections()
        self._objects: dict[str, dict[str, int]] = {}
        self._cached: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._cached_bytes = 0
        for key, size in () if shared else self.bucket.list(BLOBS_PREFIX):
            digest = digest_of(key)
            if digest is not None:
                self._objects.setdefault(digest, {})[key] = size
        cached_files: list[tuple[float, str, int]] = []
        for name in super().names():
            with suppress(FileNotFoundError):  # evicted by a server, while this process only reads
                file_stat, sizes = self.path(name).stat(), self._objects.get(name)
                if caching and sizes and file_stat.st_size not in sizes.values():
                    self._delete_cached(name)  # cached files aren't flushed: a power cut leaves them short
                else:
                    cached_files.append((file_stat.st_mtime, name, file_stat.st_size))
        self._cached.update((name, (size, 0.0)) for _, name, size in sorted(cached_files))
        self._cached_bytes += sum(size for _, _, size in cached_files)

    def _make_connections(self) -> None:
        self._lock = threading.RLock()
        self.retry = RetryPolicy()
        self._deletions = Deletions(self.bucket, self.retry)
        self._new_objects: dict[str, tuple[str, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker process: without connections and work under way."""
        with self._lock:
            state = {k: v for k, v in vars(self).items() if k in ("root", "max_size", "reserve", "durable", "cache")}
            return state | {"url": self.bucket.url, "objects": {d: dict(k) for d, k in self._objects.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bucket = Bucket(state.pop("url"))
        self._objects = state.pop("objects")
        vars(self).update(state)
        self._caches = self._shared = True
        self._evicts = False  # the folder belongs to the parent process
        self._verified_states, self._cached, self._cached_bytes = {}, OrderedDict(), 0
        self._make_connections()
        self.retry.is_endless = True

    def describe(self) -> str:
        return self.bucket.url

    def local(self) -> BlobStore:
        return LocalCopy(self)

    def opener(self) -> Callable[[], BlobStore]:
        return partial(_open_shared, self.bucket.url, self.cache)

    # The owner.

    def check_owner(self, number: str | None) -> None:
        """Check that the prefix isn't another job's; `number` is None for a new job. Raises `ConfigError` if it is."""
        raw = self.retry("read", lambda: self.bucket.get(OWNER_KEY, MAX_OWNER_BYTES))
        if raw is None:
            return  # objects without an owner are those of a first start that broke off
        owner = decode_record(Owner, raw, f"{self.bucket.url}/{OWNER_KEY}", StorageError)
        if owner.id != number:
            raise ConfigError(
                f"{self.bucket.url} has the blobs of another job, {owner.job!r}",
                hint="Give another prefix; or delete what is under this one, if that job no longer exists.",
            )

    def claim(self, number: str, job: str, model: bytes) -> None:
        """Mark the prefix as this job's, store the job's first model there if there is none, and from now on wait for a
        bucket that is away. Raises `ConfigError` if another job that began at the same time was faster.
        """
        if self.retry("read", lambda: self.bucket.get(OWNER_KEY, MAX_OWNER_BYTES)) is None:
            self._put_marker(OWNER_KEY, encode_record(Owner(number, job)), replace=False)
        self.check_owner(number)
        if not any(key == MODEL_KEY for key, _ in self.retry("list", lambda: list(self.bucket.list(MODEL_KEY)))):
            self._put_marker(MODEL_KEY, model)
        self.retry.is_endless = True

    def _put_marker(self, key: str, data: bytes, *, replace: bool = True) -> None:
        digest = hashlib.sha256(data).hexdigest()
        self.retry(WRITE_WORK, partial(self.bucket.put, key, data, digest, replace=replace))

    def first_model(self) -> bytes | None:
        return self.retry("read", lambda: self.bucket.get(MODEL_KEY, _MAX_MODEL_BYTES))

    # Its blobs.

    def objects(self) -> dict[str, dict[str, int]]:
        """Keys and sizes of the objects of each digest."""
        with self._lock:
            return {digest: dict(keys) for digest, keys in self._objects.items()}

    def names(self) -> list[str]:
        """Digests of all blobs in the bucket or the folder."""
        with self._lock:
            return sorted({*self._objects, *super().names()})

    def has(self, sha256: str) -> bool:
        if sha256 in self._objects:
            return True
        return self._shared and is_digest(sha256) and bool(self._object_keys(sha256))

    def note_objects(self, news: BucketObjects) -> None:
        with self._lock:
            for digest, (key, size) in news.items():
                self._objects.setdefault(digest, {})[key] = size
        for digest, (_, size) in news.items():
            if BlobStore.has(self, digest):
                self._note_cached(digest, size)

    def take_new_objects(self) -> dict[str, tuple[str, int]]:
        with self._lock:
            news, self._new_objects = self._new_objects, {}
        return news

    # Writing.

    def put(self, data: bytes | memoryview) -> BlobRef:
        ref = super().put(data)
        self._upload(ref.sha256, data)
        return ref

    def flush(self, sha256: str) -> None:
        if sha256 not in self._objects:
            self._upload(sha256, BlobStore.read(self, sha256))

    def _upload(self, sha256: str, data: bytes | memoryview) -> None:
        """Put a blob into the bucket, unless it is there, and count its file in the folder."""
        if sha256 not in self._objects:
            key = _new_key(sha256)
            self.retry(WRITE_WORK, lambda: self.bucket.put(key, data, sha256))
            with self._lock:
                self._objects.setdefault(sha256, {})[key] = len(data)
                self._new_objects[sha256] = key, len(data)
        self._note_cached(sha256, len(data))

    def url_for(self, ref: BlobRef, seconds: int) -> tuple[str, str]:
        key = _new_key(ref.sha256)
        return key, self.bucket.upload_url(key, ref.sha256, ref.size, seconds)

    def adopt_upload(self, ref: BlobRef, keys: Sequence[str] = ()) -> bool:
        """Verify an object that a device has put into the bucket as this blob; returns whether it is right. Then it is
        stored in bucket and folder. All other objects with this digest are deleted.

        The device was to upload the blob to one of `keys`. The bucket is searched only if the last of them is wrong."""
        return self.retry(ADOPT_WORK, partial(self._adopt, ref, keys))

    def _adopt(self, ref: BlobRef, keys: Sequence[str]) -> bool:
        right_key = next((key for key in keys[-1:] if self._verify(key, ref)), None)
        sizes = dict.fromkeys(keys, ref.size)
        if right_key is None:
            objects = self.bucket.list(f"{BLOBS_PREFIX}{ref.sha256}.")
            sizes = {key: size for key, size in objects if digest_of(key) == ref.sha256}
            candidates = [key for key, size in sorted(sizes.items()) if size == ref.size]
            right_key = next((key for key in candidates if self._verify(key, ref)), None)
        if right_key is not None:
            with self._lock:
                self._objects.setdefault(ref.sha256, {})[right_key] = ref.size
            self._note_cached(ref.sha256, ref.size)
        for key in sizes.keys() - {right_key}:
            self.forget(key)
        self.delete_objects(sizes)
        return right_key is not None

    def _verify(self, key: str, ref: BlobRef) -> bool:
        """Whether an object is this blob; if so, it is in the folder afterwards."""
        try:
            with StreamedBlob(self, ref, cached=True) as blob:
                for piece in self.bucket.stream(key):
                    blob.write(piece)
                if ref.size and not blob.received_bytes:
                    return False  # usually there is no such object: the device has used another address
                blob.finish()
        except ProtocolError as error:
            log.warning("%s/%s is not the update that was announced: %s", self.bucket.url, key, error)
            return False
        return True

    def delete_objects(self, keys: Iterable[str]) -> None:
        with self._lock:
            unknown = [key for key in keys if key not in self._objects.get(digest_of(key) or "", {})]
        self._deletions.add(unknown)

    # Reading.

    def known_size(self, sha256: str) -> int | None:
        """Size of a blob that is known to be in the bucket; the bucket isn't asked."""
        with self._lock:
            return max(self._objects.get(sha256, {}).values(), default=None)

    def size(self, sha256: str) -> int:
        """Size of a blob, which is fetched to the folder if that caches any."""
        known_size = None if self._caches else self.known_size(sha256)
        if known_size is not None:
            return known_size
        return self._with_repair(sha256, lambda: BlobStore.size(self, sha256), len)

    def read(self, sha256: str) -> bytes:
        """A blob's bytes, verified."""
        if self._caches:
            return self._with_repair(sha256, lambda: BlobStore.read(self, sha256), bytes)
        if BlobStore.has(self, sha256):
            with suppress(StorageError):  # it may be evicted meanwhile, or be damaged while the bucket's is not
                return BlobStore.read(self, sha256)
        return self.fetch(sha256)

    def map(self, sha256: str) -> memoryview:
        if self._caches:
            return self._with_repair(
                sha256, lambda: BlobStore.map(self, sha256), lambda data: self._map_or_wrap(sha256, data)
            )
        return memoryview(self.read(sha256))

    def _map_or_wrap(self, sha256: str, data: bytes) -> memoryview:
        try:
            return BlobStore.map(self, sha256)
        except StorageError:  # evicted again
            return memoryview(data)

    def table(self, sha256: str) -> bytes:
        return self._with_repair(sha256, lambda: BlobStore.table(self, sha256), leaf_table)

    def fetch(self, sha256: str) -> bytes:
        """A blob's bytes from the bucket, verified; cached in the folder if that caches any.

        Raises `MissingBlobError` if the bucket doesn't have the blob, and `StorageError` if it has only a damaged one.
        """
        super().path(sha256)
        if self._caches:
            self.check_room(self.known_size(sha256) or 0)  # before it is fetched in vain
        damaged = ""
        for key in self._object_keys(sha256):
            data = self.retry("read", partial(self.bucket.get, key, self.max_size))
            if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                if self._caches:
                    self.check_room(len(data))
                    self.write_file(super().path(sha256), data, flush=False)
                    self._note_cached(sha256, len(data))
                return data
            damaged = key if data is not None else damaged
        if damaged:
            raise StorageError(f"{self.bucket.url}/{damaged} is damaged", hint="See `fedprune-server check`.")
        raise MissingBlobError(f"blob {sha256} is not in {self.bucket.url}", hint="Restore the server's backup.")

    def _with_repair(
        self, sha256: str, read_cached: Callable[[], _Result], from_fetched: Callable[[bytes], _Result]
    ) -> _Result:
        """Read a blob of the folder, which is verified, with `read_cached`. If it is missing or damaged, fetch it from
        the bucket, and make the same result of the fetched bytes."""
        try:
            if BlobStore.has(self, sha256) or not self._object_keys(sha256):
                result = read_cached()
                self.touch(sha256)
                return result
        except StorageFullError:
            raise
        except StorageError as error:
            if not self._object_keys(sha256):
                raise
            if BlobStore.has(self, sha256):
                log.warning("%s: it is fetched again", error.what)
        self._delete_cached(sha256)
        return from_fetched(self.fetch(sha256))

    def _object_keys(self, sha256: str) -> list[str]:
        """Keys of a blob's objects. With `shared` the bucket is asked, because other processes store blobs, too."""
        with self._lock:
            keys = list(self._objects.get(sha256, ()))
        if keys or not self._shared:
            return keys
        listed_keys = self.retry("list", lambda: dict(self.bucket.list(f"{BLOBS_PREFIX}{sha256}.")))
        if listed_keys:
            with self._lock:
                self._objects.setdefault(sha256, {}).update(listed_keys)
        return list(listed_keys)

    # The folder.

    def touch(self, sha256: str) -> None:
        """Mark a blob of the folder as used, so that others are evicted first."""
        with self._lock:
            if sha256 in self._cached:
                self._cached[sha256] = self._cached.pop(sha256)[0], time.monotonic()

    def _note_cached(self, sha256: str, size: int) -> None:
        """Note a blob's file in the folder as used just now, and evict others if there are too many."""
        with self._lock:
            self._forget_cached(sha256)
            self._cached[sha256] = size, time.monotonic()
            self._cached_bytes += size
        self._evict()

    def check_room(self, size: int) -> None:
        try:
            super().check_room(size)
        except StorageFullError:
            self.check_size(size)
            self._evict(size + self.reserve)
            super().check_room(size)

    def _evict(self, bytes_to_free: int = 0) -> None:
        """Evict the least recently used blobs that are in the bucket: at least `bytes_to_free` bytes of them."""
        if not self._evicts:
            return
        with self._lock:
            excess, now = max(self._cached_bytes - self.cache, bytes_to_free), time.monotonic()
            if excess <= 0:
                return
            for digest, (size, used_at) in list(self._cached.items()):
                if excess <= 0 or (not bytes_to_free and now - used_at < RECENT_USE_S):
                    return
                if digest in self._objects:
                    self._delete_cached(digest)
                    excess -= size

    def _forget_cached(self, sha256: str) -> None:
        size, _ = self._cached.pop(sha256, (0, 0.0))
        self._cached_bytes -= size

    def _delete_cached(self, sha256: str) -> None:
        with self._lock, storage_errors(f"can't delete blob {sha256}"):
            path = super().path(sha256)
            self._forget_cached(sha256)
            self._verified_states.pop(sha256, None)
            path.unlink(missing_ok=True)
            path.with_name(path.name + TABLE_SUFFIX).unlink(missing_ok=True)

    # Deleting.

    def delete(self, sha256: str) -> None:
        """Forget a blob, and delete its objects in the background."""
        with self._lock:
            super().delete(sha256)
            self._forget_cached(sha256)
            keys = self._objects.pop(sha256, {})
        self._deletions.add(keys)

    def forget(self, key: str) -> None:
        """Treat an object as missing."""
        with self._lock:
            digest = digest_of(key) or ""
            keys = self._objects.get(digest, {})
            keys.pop(key, None)
            if not keys:
                self._objects.pop(digest, None)

    def close(self, patience_s: float = 5.0) -> None:
        """Finish deletions, for this long at most, and not while the bucket is away. The next start does the rest."""
        self._deletions.wait(0.0 if self.is_unreachable else patience_s)
        self.retry.stop()

    @property
    def is_unreachable(self) -> bool:
        return self.retry.holds_updates


class LocalCopy(BlobStore):
    """The blobs of a bucket that are in the folder, for callers that must not wait for the bucket."""

    def __init__(self, store: BucketStore) -> None:
        super().__init__(store.root, max_size=store.max_size, reserve=store.reserve, durable=store.durable)
        self._store = store
        # Shared: the store forgets there which evicted blobs were verified.
        self._verified_states = store._verified_states

    def has(self, sha256: str) -> bool:
        is_cached = super().has(sha256)
        if is_cached:
            self._store.touch(sha256)
        return is_cached

    def map(self, sha256: str) -> memoryview:
        self._store.touch(sha256)
        return super().map(sha256)

    def size(self, sha256: str) -> int:
        """Size of a blob, which is fetched to the folder if that caches any."""
        return self._store.known_size(sha256) or super().size(sha256)

    def check_room(self, size: int) -> None:
        self._store.check_room(size)


def _new_key(sha256: str) -> str:
    return f"{BLOBS_PREFIX}{sha256}.{secrets.token_hex(8)}"


def _open_shared(url: str, cache: int) -> BucketStore:
    """Open the bucket with a temporary folder of this process as its cache. A cluster kills its processes, so the
    folders of dead ones are removed here."""
    for folder_left in Path(tempfile.gettempdir()).glob(f"{_CACHE_PREFIX}*"):
        owner = folder_left.name.removeprefix(_CACHE_PREFIX).partition("-")[0]
        pid = owner.partition(".")[0]
        if pid.isdigit() and owner != process_name(pid):
            shutil.rmtree(folder_left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_CACHE_PREFIX}{process_name(os.getpid())}-"))
    return BucketStore(folder, url, cache=cache, shared=True)
