"""A worker with helpers: submodels of a round are made in several processes at a time.

Making a submodel may be dear (optimal transport), a round makes one for every device, and none needs another. What the
helpers are given are digests; what they answer is an offer, whose blobs are in the store by then. So it makes no
difference which process does what, or whether it does it twice.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import closing, contextmanager

from fedprune.blobs import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.job import Job
from fedprune_export.imported import Model
from fedprune_server.bucket_store import BucketStore, Objects
from fedprune_server.children import begin_helper
from fedprune_server.worker import Worker
from fedprune_server.workshop import Work

log = logging.getLogger(__name__)

_Key = tuple[int, str, int]
_Made = tuple[on.Event, Objects]

_helper: Worker | None = None
"""In a helper's process: its worker."""


class Crew:
    """Carries out commands as its worker does; submodels that are expected are made by helpers meanwhile.

    Args:
        worker: Does everything else, and whatever a helper fails at, so that errors are its own.
        helpers: How many processes.
    """

    def __init__(self, worker: Worker, helpers: int) -> None:
        self._worker = worker
        self._helpers = helpers
        self._pool = self._new_pool()
        self._expected: dict[_Key, tuple[do.Extract, Future[_Made]]] = {}

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Let helpers begin with the submodels among commands that will be carried out in a moment."""
        self._worker.expect(commands)
        for command in commands:
            if isinstance(command, do.Extract) and _key(command) not in self._expected:
                self._expected[_key(command)] = (command, self._submit(command))

    def execute(self, command: Work) -> on.Event:
        """Carry out one command.

        Raises:
            FedpruneError: It can't be done.
        """
        if not isinstance(command, do.Extract):
            return self._worker.execute(command)
        expected, future = self._expected.pop(_key(command), (None, None))
        if future is None or expected != command:
            return self._worker.execute(command)
        try:
            event, objects = future.result()
        except Exception:  # noqa: BLE001 - a helper may fail or be killed in any way; the worker will tell the reason
            return self._worker.execute(command)
        if isinstance(self._worker.store, BucketStore):
            self._worker.store.learn(objects)
        if isinstance(event, on.Extracted):
            self._worker.note(event)
            return self._worker.sliced(command, event)
        return event

    def graphs(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds refer to."""
        return self._worker.graphs()

    def _submit(self, command: do.Extract) -> Future[_Made]:
        try:
            return self._pool.submit(_extract, command)
        except BrokenExecutor:
            log.warning("a helper was killed, maybe since memory ran out; others take its place")
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(_extract, command)

    def _new_pool(self) -> ProcessPoolExecutor:
        worker = self._worker
        return ProcessPoolExecutor(
            self._helpers,
            multiprocessing.get_context("spawn"),  # a thread may hold any lock at the moment of a fork
            _begin,
            (os.getpid(), worker.job, worker.model, worker.store),
        )

    def close(self) -> None:
        """Let the helpers go."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def helped(worker: Worker | Crew, helpers: int) -> Iterator[Worker | Crew]:
    """A worker, with helpers if there are to be several processes."""
    if helpers == 1 or not isinstance(worker, Worker):
        yield worker
        return
    with closing(Crew(worker, helpers)) as crew:
        yield crew


def _key(command: do.Extract) -> _Key:
    return command.basis.round, command.part.device, command.part.attempt


def _begin(parent: int, job: Job, model: Model, store: BlobStore) -> None:
    global _helper
    begin_helper(parent)
    _helper = Worker(job, model, store)


def _extract(command: do.Extract) -> _Made:
    if _helper is None:
        raise RuntimeError("this is no helper's process")
    event = _helper.execute(command)
    return event, _helper.store.news() if isinstance(_helper.store, BucketStore) else {}
