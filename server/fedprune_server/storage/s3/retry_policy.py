"""Repeats calls of a bucket while the bucket can't be used; deletes its objects in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from fedprune.core.errors import StorageError
from fedprune_server.storage.s3.bucket import Bucket, BucketError

log = logging.getLogger("fedprune.server")

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0

# Kinds of work for which updates wait.
WRITE_WORK, ADOPT_WORK = "write", "verify uploads"

_Result = TypeVar("_Result")


class StoppedError(StorageError):
    """The server ends while a call waits for the bucket."""


class RetryPolicy:
    """Repeats calls while the bucket can't be used, until `stop` if it `is_endless`; otherwise an error is raised at
    once. May be called from any thread."""

    def __init__(self) -> None:
        self.is_endless = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._waiting_kinds: frozenset[str] = frozenset()

    @property
    def holds_updates(self) -> bool:
        """Whether a write or the verification of an upload waits."""
        return bool({WRITE_WORK, ADOPT_WORK} & self._waiting_kinds)

    def stop(self) -> None:
        self._stopped.set()

    def __call__(self, kind: str, work: Callable[[], _Result]) -> _Result:
        """Call a function, repeatedly with growing pauses while the bucket can't be used. Each kind of work is logged
        once as waiting. Raises `StoppedError` if `stop` was called meanwhile, and `BucketError` at once if the policy
        isn't endless."""
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = work()
            except BucketError as error:  # noqa: PERF203 - each turn waits anyway
                if not self.is_endless:
                    raise
                if self._note_waiting(kind, waits=True):
                    log.warning("waiting for the bucket, nothing is lost: %s", error)
                if self._stopped.wait(pause):
                    raise StoppedError(error.what) from error
                pause = min(2 * pause, MAX_PAUSE_S)
            else:
                if kind in self._waiting_kinds and self._note_waiting(kind, waits=False):
                    log.info("the bucket is back: to %s goes on", kind)
                return result

    def _note_waiting(self, kind: str, *, waits: bool) -> bool:
        """Note whether a kind of work waits; returns whether this has changed."""
        with self._lock:
            has_changed = waits != (kind in self._waiting_kinds)
            self._waiting_kinds = self._waiting_kinds | {kind} if waits else self._waiting_kinds - {kind}
            return has_changed


class Deletions:
    """Deletes objects on a thread that runs while there are any, all waiting ones in one request."""

    def __init__(self, bucket: Bucket, retry: RetryPolicy) -> None:
        self._bucket, self._retry = bucket, retry
        self._lock = threading.Lock()
        self._keys: list[str] = []
        self._thread: threading.Thread | None = None

    def add(self, keys: Iterable[str]) -> None:
        """Delete objects soon, if they exist."""
        with self._lock:
            self._keys.extend(keys)
            if self._keys and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fedprune-bucket", daemon=True)
                self._thread.start()

    def wait(self, patience_s: float) -> None:
        """Wait for all deletions, for this long at most."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(patience_s)

    def _run(self) -> None:
        while keys := self._take_keys():
            try:
                self._retry("delete", partial(self._bucket.delete, keys))
            except StoppedError:  # noqa: PERF203 - each turn waits for the network anyway
                with self._lock:
                    self._keys.clear()
            except StorageError:  # without endless retries these objects are left, and later ones have their turn
                continue

    def _take_keys(self) -> list[str]:
        with self._lock:
            keys, self._keys = self._keys, []
            if not keys:
                self._thread = None
            return keys
