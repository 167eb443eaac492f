"""Objects of a bucket, deleted in the background: nobody waits for that, and the next start sees to what is left."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from functools import partial

from fedprune.core.errors import StorageError
from fedprune_server.storage.s3.bucket import Bucket
from fedprune_server.storage.s3.retry import RetryPolicy, StoppedError


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
