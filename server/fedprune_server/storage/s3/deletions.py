"""Deletes objects of a bucket in the background."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial

from fedprune.core.errors import StorageError
from fedprune_server.storage.s3.bucket import Bucket
from fedprune_server.storage.s3.retry_policy import RetryPolicy, StoppedError


class Deletions:
    """Deletes objects on a thread that runs while there are any, all waiting ones in one request."""

    def __init__(self, bucket: Bucket, patience: RetryPolicy) -> None:
        self._bucket = bucket
        self._retry = patience
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
