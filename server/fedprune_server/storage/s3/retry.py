"""Waiting for a bucket that can't be used at the moment, for as long as it takes, and saying so once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from fedprune.core.errors import StorageError
from fedprune_server.storage.s3.bucket import BucketError

log = logging.getLogger("fedprune.server")

PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
WRITE = "write"

_Result = TypeVar("_Result")


class StoppedError(StorageError):
    """The server ends while something waits for the bucket."""


class RetryPolicy:
    """Repeats what can't be done at the moment; from any thread.

    Attributes:
        endless: Whether it waits until `stop`; else an error is raised at once.
    """

    def __init__(self) -> None:
        self.endless = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._missed: frozenset[str] = frozenset()

    @property
    def writing(self) -> bool:
        """Whether something waits to be written."""
        return WRITE in self._missed

    def stop(self) -> None:
        """Let nobody wait any more."""
        self._stopped.set()

    def __call__(self, kind: str, work: Callable[[], _Result]) -> _Result:
        """Do something, again and again with growing pauses where the bucket can't be used.

        Args:
            kind: What it is, in a word: each kind is said to wait once.
            work: Does it.

        Raises:
            BucketError: It can't be done, and there is no patience.
            StoppedError: `stop` was called meanwhile.
        """
        pause = PAUSE_S
        while True:
            try:
                result = work()
            except BucketError as error:  # noqa: PERF203 - each turn waits anyway
                if not self.endless:
                    raise
                if self._note(kind, missed=True):
                    log.warning("waiting for the bucket, nothing is lost: %s", error)
                if self._stopped.wait(pause):
                    raise StoppedError(error.what) from error
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                if kind in self._missed and self._note(kind, missed=False):
                    log.info("the bucket is back: to %s goes on", kind)
                return result

    def _note(self, kind: str, *, missed: bool) -> bool:
        """Note whether a kind of work waits; returns whether that is news."""
        with self._lock:
            news = missed != (kind in self._missed)
            self._missed = self._missed | {kind} if missed else self._missed - {kind}
            return news
