"""Repeats calls of a bucket while the bucket can't be used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from fedprune.core.errors import StorageError
from fedprune_server.storage.s3.bucket import BucketError

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
