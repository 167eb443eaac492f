"""Helpers in processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any, Protocol

from fedprune_server.executor.pool_tasks import Task, WorkerSpec
from fedprune_server.executor.worker import Worker
from fedprune_server.process.children import begin_helper

log = logging.getLogger("fedprune.server")

_helper: Worker | None = None
"""In a helper's process: its worker."""


class HelperPool(Protocol):
    """Runs tasks in helper processes."""

    @property
    def size(self) -> int:
        """How many tasks it does at a time."""
        ...

    @property
    def adds(self) -> bool:
        """Whether updates are checked and added up by helpers, too."""
        ...

    @property
    def patience_s(self) -> float | None:
        """How long a result is waited for; None for as long as it takes."""
        ...

    def submit(self, task: Task, argument: Any) -> Future[Any]:
        """Have a task done. Whatever goes wrong is in the future."""
        ...

    def close(self) -> None: ...


class ProcessPool:
    """Some processes, each with the model in its memory.

    Args:
        worker: Whose job they help with.
        size: How many.
    """

    adds = False
    patience_s = None

    def __init__(self, worker: Worker, size: int) -> None:
        self.size = size
        self._settings = WorkerSpec.of(worker)
        self._pool = self._new_pool()

    def submit(self, task: Task, argument: Any) -> Future[Any]:
        try:
            return self._pool.submit(_do, task, argument)
        except BrokenExecutor:
            log.warning("a helper was killed, maybe since memory ran out; others take its place")
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(_do, task, argument)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self.size,
            multiprocessing.get_context("spawn"),  # a thread may hold any lock at the moment of a fork
            _begin,
            (os.getpid(), self._settings),
        )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int, settings: WorkerSpec) -> None:
    global _helper
    begin_helper(parent)
    _helper = settings.worker()


def _do(task: Task, argument: Any) -> Any:
    if _helper is None:
        raise RuntimeError("this is no helper's process")
    return task(_helper, argument)
