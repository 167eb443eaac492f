"""A blob store whose home is a bucket; its folder is a cache of what the bucket has.

A blob is kept once the bucket has it. Objects are named by digest and a random text, and no name is used twice: so a
deletion that was given up on, or that a server sent which has lost its job, hits nothing that was put later, even where
the same bytes were.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedprune.blobs.blob_ref import SUFFIX, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, StorageError, StorageFullError
from fedprune.core.validation import is_digest
from fedprune_server.storage.s3.bucket import WRITE, Bucket, RetryPolicy, StoppedError
from fedprune_server.storage.s3.layout import BLOBS, MODEL, OWNER, OWNER_LIMIT, Owner, digest_of


class Deletions:
    """Deletes objects one by one, in a thread that lives while there are any.

    Args:
        bucket: Where they are.
        patience: How long a bucket is waited for that can't be used.
    """

    def __init__(self, bucket: Bucket, patience: RetryPolicy) -> None:
        self._bucket = bucket
        self._patience = patience
        self._lock = threading.Lock()
        self._doomed: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def add(self, keys: Iterable[str]) -> None:
        """Have objects deleted; they need not be there."""
        with self._lock:
            self._doomed.extend(keys)
            if self._doomed and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fedprune-bucket", daemon=True)
                self._thread.start()

    def wait(self, patience_s: float) -> None:
        """Let it come to an end, but don't take longer than this."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(patience_s)

    def _run(self) -> None:
        while (key := self._next()) is not None:
            try:
                self._patience("delete", partial(self._bucket.delete, key))
            except StoppedError:  # noqa: PERF203 - each turn waits for the network anyway
                self._forget()
            except StorageError:  # where there is no patience, this one is left and the others have their turn
                continue

    def _next(self) -> str | None:
        with self._lock:
            if self._doomed:
                return self._doomed.popleft()
            self._thread = None
            return None

    def _forget(self) -> None:
        with self._lock:
            self._doomed.clear()


log = logging.getLogger("fedprune.server")

FRESH_S = 60.0
"""What was used so lately stays in the folder, however much that is: somebody is about to ask for the rest of it."""

_MODEL_LIMIT = 2**31

_Result = TypeVar("_Result")
Objects = Mapping[str, tuple[str, int]]
"""By digest an object's key and size."""


class NotThereError(StorageError):
    """The bucket doesn't have a blob."""


class BucketStore(BlobStore):
    """Blobs in a bucket.

    What is read is fetched if it isn't in the folder, and checked against its name before it is there. `put` returns
    when the bucket has the blob; `delete` at once, and the bucket's objects go in the background.

    Args:
        root: The folder of the cache.
        url: The bucket and the prefix.
        cache: Bytes that the folder may hold of what the bucket has, too.
        keeping: Whether what is fetched stays in the folder. Whoever only looks leaves it as it is.

    Attributes:
        bucket: The bucket.
        patience: How long calls wait for a bucket that can't be used: at first not at all.

    Raises:
        BucketError: The bucket can't be used.
    """

    def __init__(self, root: Path, url: str, *, cache: int = 2**62, keeping: bool = True) -> None:
        super().__init__(root)
        self.bucket = Bucket(url)
        self._cache = cache
        self._keeping = keeping
        self._helper = False
        self._begin()
        self._objects: dict[str, dict[str, int]] = {}
        self._held: OrderedDict[str, tuple[int, float]] = OrderedDict()
        for key, size in self.bucket.list(BLOBS):
            digest = digest_of(key)
            if digest is not None:
                self._objects.setdefault(digest, {})[key] = size
        lying: list[tuple[float, str, int]] = []
        for name in super().names():
            with suppress(FileNotFoundError):  # let go of by a server, while this one only looks
                about = self.path(name).stat()
                lying.append((about.st_mtime, name, about.st_size))
        self._held.update((name, (size, 0.0)) for _, name, size in sorted(lying))

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self.patience = RetryPolicy()
        self._deletions = Deletions(self.bucket, self.patience)
        self._news: dict[str, tuple[str, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a helper's process gets: no connection, nothing that is under way."""
        with self._lock:
            state = {k: v for k, v in vars(self).items() if k in ("root", "max_size", "reserve", "durable", "_cache")}
            return state | {"url": self.bucket.url, "objects": {d: dict(k) for d, k in self._objects.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bucket = Bucket(state.pop("url"))
        self._objects = state.pop("objects")
        vars(self).update(state)
        self._keeping = self._helper = True
        self._checked, self._held = {}, OrderedDict()
        self._begin()
        self.patience.endless = True

    # Whose it is.

    def check_owner(self, number: str | None) -> None:
        """Make sure that nobody else's blobs are under the prefix.

        Args:
            number: The job's own; None for one that has none yet.

        Raises:
            ConfigError: Another job's are.
            BucketError: The bucket can't be used.
        """
        raw = self.patience("read", lambda: self.bucket.get(OWNER, OWNER_LIMIT))
        if raw is None:
            return  # what may be there is of a first start that broke off
        owner = Owner.parse(raw, f"{self.bucket.url}/{OWNER}")
        if owner.number != number:
            raise ConfigError(
                f"{self.bucket.url} has the blobs of another job, {owner.job!r}",
                hint="Give another prefix; or delete what lies under this one, if that job is no more.",
            )

    def claim(self, number: str, job: str, model: bytes) -> None:
        """Say whose blobs these are, and lay the model with which the job began beside them if none is there.

        Raises:
            ConfigError: Another job, which began at the same time, has said so first.
            BucketError: The bucket can't be used.
        """
        if self.patience("read", lambda: self.bucket.get(OWNER, OWNER_LIMIT)) is None:
            self._lay(OWNER, Owner(number, job).to_bytes(), anew=False)
        self.check_owner(number)
        if not any(key == MODEL for key, _ in self.patience("list", lambda: list(self.bucket.list(MODEL)))):
            self._lay(MODEL, model)

    def _lay(self, key: str, data: bytes, *, anew: bool = True) -> None:
        digest = hashlib.sha256(data).hexdigest()
        self.patience(WRITE, partial(self.bucket.put, key, data, digest, anew=anew))

    def model(self) -> bytes | None:
        """The model with which the job began, not checked.

        Raises:
            BucketError: The bucket can't be used.
        """
        return self.patience("read", lambda: self.bucket.get(MODEL, _MODEL_LIMIT))

    # What it has.

    def objects(self) -> dict[str, dict[str, int]]:
        """By digest the keys of its objects, with their sizes."""
        with self._lock:
            return {digest: dict(keys) for digest, keys in self._objects.items()}

    def names(self) -> list[str]:
        """Digests of all blobs, in the bucket or in the folder."""
        with self._lock:
            return sorted({*self._objects, *super().names()})

    def has(self, sha256: str) -> bool:
        """Whether the bucket has a blob."""
        if sha256 in self._objects:
            return True
        return self._helper and is_digest(sha256) and bool(self._find(sha256))

    def learn(self, news: Objects) -> None:
        """Take note of what a helper's process has put."""
        with self._lock:
            for digest, (key, size) in news.items():
                self._objects.setdefault(digest, {})[key] = size
        for digest, (_, size) in news.items():
            self._hold(digest, size)

    def news(self) -> dict[str, tuple[str, int]]:
        """What was put since the last call, for `learn`."""
        with self._lock:
            found, self._news = self._news, {}
        return found

    # In.

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Keep these bytes: they are in the bucket when this returns."""
        ref = super().put(data)
        self._ship(ref.sha256, data)
        return ref

    def ship(self, sha256: str) -> None:
        """Have the bucket keep a blob of the folder.

        Raises:
            BucketError: The bucket can't be used.
            StorageError: The blob isn't in the folder, or is damaged there.
        """
        if not self._known(sha256):
            self._ship(sha256, BlobStore.read(self, sha256))

    def _ship(self, sha256: str, data: bytes | memoryview) -> None:
        if not self._known(sha256):
            key = f"{BLOBS}{sha256}.{secrets.token_hex(8)}"
            self.patience(WRITE, lambda: self.bucket.put(key, data, sha256))
            with self._lock:
                self._objects.setdefault(sha256, {})[key] = len(data)
                self._news[sha256] = key, len(data)
        self._hold(sha256, len(data))

    def _known(self, sha256: str) -> bool:
        return sha256 in self._objects

    # Out.

    def known_size(self, sha256: str) -> int | None:
        """Bytes of a blob that the bucket has, without asking it."""
        with self._lock:
            return max(self._objects.get(sha256, {}).values(), default=None)

    def size(self, sha256: str) -> int:
        """Bytes of a blob, which is in the folder then if anything stays there."""
        known = None if self._keeping else self.known_size(sha256)
        if known is not None:
            return known
        return self._healed(sha256, lambda: BlobStore.size(self, sha256), len)

    def read(self, sha256: str) -> bytes:
        """A blob's bytes, checked against its name."""
        if self._keeping:
            return self._healed(sha256, lambda: BlobStore.read(self, sha256), bytes)
        if BlobStore.has(self, sha256):
            with suppress(StorageError):  # it may be let go of, or be damaged where the bucket's is not
                return BlobStore.read(self, sha256)
        return self.fetch(sha256)

    def map(self, sha256: str) -> memoryview:
        """A blob's bytes as a view on its file."""
        if self._keeping:
            return self._healed(sha256, lambda: BlobStore.map(self, sha256), lambda data: self._mapped(sha256, data))
        return memoryview(self.read(sha256))

    def _mapped(self, sha256: str, data: bytes) -> memoryview:
        try:
            return BlobStore.map(self, sha256)
        except StorageError:  # let go of again
            return memoryview(data)

    def table(self, sha256: str) -> bytes:
        """A blob's leaf table."""
        return self._healed(sha256, lambda: BlobStore.table(self, sha256), leaf_table)

    def fetch(self, sha256: str) -> bytes:
        """A blob's bytes out of the bucket, checked; they are in the folder then if anything stays there.

        Raises:
            BucketError: The bucket can't be used.
            NotThereError: It doesn't have the blob.
            StorageError: It has only a damaged one.
        """
        super().path(sha256)
        if self._keeping:
            self.check_room(self.known_size(sha256) or 0)  # before it has come for nothing
        damaged = ""
        for key in self._find(sha256):
            data = self.patience("read", partial(self.bucket.get, key, self.max_size))
            if data is not None and hashlib.sha256(data).hexdigest() == sha256:
                if self._keeping:
                    self.check_room(len(data))
                    self.write_file(super().path(sha256), data)
                    self._hold(sha256, len(data))
                return data
            damaged = key if data is not None else damaged
        if damaged:
            raise StorageError(f"{self.bucket.url}/{damaged} is damaged", hint="See `fedprune-server check`.")
        raise NotThereError(f"blob {sha256} is not in {self.bucket.url}", hint="Restore the server's backup.")

    def _healed(self, sha256: str, look: Callable[[], _Result], make: Callable[[bytes], _Result]) -> _Result:
        """Look at a blob of the folder; make the same of what is fetched if it isn't there, or not what it was."""
        try:
            if BlobStore.has(self, sha256) or not self._find(sha256):
                result = look()
                self.touch(sha256)
                return result
        except StorageFullError:
            raise
        except StorageError as error:
            if not self._find(sha256):
                raise
            if BlobStore.has(self, sha256):
                log.warning("%s: it is fetched again", error.what)
        self._unlink(sha256)
        return make(self.fetch(sha256))

    def _find(self, sha256: str) -> list[str]:
        """The keys of a blob's objects. In a helper's process others put blobs, too, so that it asks the bucket."""
        with self._lock:
            known = list(self._objects.get(sha256, ()))
        if known or not self._helper:
            return known
        found = self.patience("list", lambda: dict(self.bucket.list(f"{BLOBS}{sha256}.")))
        if found:
            with self._lock:
                self._objects.setdefault(sha256, {}).update(found)
        return list(found)

    # The folder.

    def touch(self, sha256: str) -> None:
        """A blob of the folder was used: others make room first."""
        with self._lock:
            if sha256 in self._held:
                self._held[sha256] = self._held.pop(sha256)[0], time.monotonic()

    def _hold(self, sha256: str, size: int) -> None:
        with self._lock:
            self._held.pop(sha256, None)
            self._held[sha256] = size, time.monotonic()
        self._trim()

    def check_room(self, size: int) -> None:
        """Make room in the folder for so many bytes more."""
        try:
            super().check_room(size)
        except StorageFullError:
            self.check_size(size)
            self._trim(size + self.reserve)
            super().check_room(size)

    def _trim(self, free: int = 0) -> None:
        """Let go of what was not used for longest, and is in the bucket.

        Args:
            free: So many bytes are to be freed, however much the folder may hold.
        """
        if self._helper:
            return
        with self._lock:
            over = max(sum(size for size, _ in self._held.values()) - self._cache, free)
            now = time.monotonic()
            for digest, (size, used) in list(self._held.items()):
                if over <= 0 or (not free and now - used < FRESH_S):
                    return
                if digest in self._objects:
                    self._unlink(digest)
                    over -= size

    def _unlink(self, sha256: str) -> None:
        with self._lock, storage_errors(f"can't delete blob {sha256}"):
            path = super().path(sha256)
            self._held.pop(sha256, None)
            self._checked.pop(sha256, None)
            path.unlink(missing_ok=True)
            path.with_name(path.name + SUFFIX).unlink(missing_ok=True)

    # Away.

    def delete(self, sha256: str) -> None:
        """Forget a blob; its objects are deleted in the background."""
        with self._lock:
            super().delete(sha256)
            self._held.pop(sha256, None)
            keys = self._objects.pop(sha256, {})
        self._deletions.add(keys)

    def forget(self, key: str) -> None:
        """Take an object for gone."""
        with self._lock:
            digest = digest_of(key) or ""
            known = self._objects.get(digest, {})
            known.pop(key, None)
            if not known:
                self._objects.pop(digest, None)

    def close(self, patience_s: float = 5.0) -> None:
        """Delete what is still to be deleted, but don't take longer than this; the next start sees to the rest."""
        self._deletions.wait(patience_s)
        self.patience.stop()

    @property
    def away(self) -> bool:
        """Whether something waits to be written, since the bucket can't be used."""
        return self.patience.writing


class LocalCopy(BlobStore):
    """What of a bucket's blobs lies in the folder: whoever may not wait for the bucket looks here.

    Args:
        store: The store.
    """

    def __init__(self, store: BucketStore) -> None:
        super().__init__(store.root, max_size=store.max_size, reserve=store.reserve, durable=store.durable)
        self._store = store
        self._checked = store._checked  # what is let go of is forgotten there

    def has(self, sha256: str) -> bool:
        """Whether a blob is in the folder."""
        found = super().has(sha256)
        if found:
            self._store.touch(sha256)
        return found

    def map(self, sha256: str) -> memoryview:
        """A blob's bytes as a view on its file."""
        self._store.touch(sha256)
        return super().map(sha256)

    def size(self, sha256: str) -> int:
        """Bytes of a blob, which may be let go of at any moment."""
        return self._store.known_size(sha256) or super().size(sha256)

    def check_room(self, size: int) -> None:
        """Make room for so many bytes more."""
        self._store.check_room(size)


def near(store: BlobStore) -> BlobStore:
    """The blobs of a store that nobody has to wait for: of a bucket's, those in the folder."""
    return LocalCopy(store) if isinstance(store, BucketStore) else store
