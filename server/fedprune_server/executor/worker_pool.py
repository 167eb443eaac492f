"""A worker with helpers: processes of this machine, or of a cluster.

Making a submodel may be dear (optimal transport), a round makes one for every device, and none needs another; and a big
model's updates may be more than one machine adds up in time. What helpers are given are digests; what they answer is an
event, whose blobs are in the store by then, or sums, which are whole numbers. So it makes no difference which process
does what, or whether it does it twice; and what helpers fail at, the worker does itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, reason
from fedprune_server.config.cluster_url import PROCESSES
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.background import Work
from fedprune_server.executor.offers import blobs_of
from fedprune_server.executor.process_pool import Pool, ProcessPool
from fedprune_server.executor.ray_pool import RayPool
from fedprune_server.executor.shared_sums import BATCH, BLOCK, SharedSums
from fedprune_server.executor.worker import Worker
from fedprune_server.storage.s3.store import BucketStore

log = logging.getLogger(__name__)

_Key = tuple[str, int, str, int]

_GROUP, _GROUPS = 16, 4
"""So many submodels at most are one task, and so many tasks there are at least for each helper, if there are enough."""


class DistributedWorker:
    """Carries out commands as its worker does; what is expected is done by helpers meanwhile.

    Args:
        worker: Does everything else, and whatever a helper fails at, so that errors are its own.
        pool: The helpers.
        block: Numbers of a model that are worth a task, where helpers add up.
        batch: Updates that are added up together.
    """

    def __init__(self, worker: Worker, pool: Pool, *, block: int = BLOCK, batch: int = BATCH) -> None:
        self._worker = worker
        self._pool = pool
        self._shared = SharedSums(worker, pool, block, batch) if pool.adds else None
        self._expected: dict[_Key, tuple[do.Command, Future[Any], int]] = {}
        self._complained = ""

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Let helpers begin with what they can do of commands that will be carried out in a moment."""
        self._worker.expect(commands)
        extracts = [c for c in commands if isinstance(c, do.Extract) and _key(c) not in self._expected]
        group = 1
        if self._pool.adds:
            group = max(1, min(_GROUP, math.ceil(len(extracts) / (_GROUPS * max(1, self._pool.size)))))
        for at in range(0, len(extracts), group):
            some = tuple(extracts[at : at + group])
            future = self._pool.submit(pool_tasks.extract, some)
            self._expected |= {_key(c): (c, future, i) for i, c in enumerate(some)}
        for command in commands:
            if isinstance(command, do.Fold) and self._shared is not None and self._shared.takes(command):
                self._expected[_key(command)] = (command, self._pool.submit(pool_tasks.check, command), 0)

    def execute(self, command: Work) -> on.Event:
        """Carry out one command.

        Raises:
            FedpruneError: It can't be done.
        """
        if isinstance(command, do.Extract):
            return self._extract(command)
        if self._shared is not None and isinstance(command, do.Fold):
            event = self._result(command)
            if isinstance(event, on.Folded):
                self._shared.passed(command)
                return event
            if isinstance(event, on.UpdateRejected):
                return event
        if self._shared is not None and isinstance(command, do.Close):
            updates = [self._worker.updates.update(c) for c in command.contributions]
            shares = {u.device: u.shares for u in self._worker.round_of(command).limited(updates).updates}
            counted = (c for c in command.contributions if c.part.device in shares)
            limited = tuple(replace(c, shares=shares[c.part.device]) for c in counted)
            self._shared.gather(replace(command, contributions=limited))
        return self._worker.execute(command)

    def _extract(self, command: do.Extract) -> on.Event:
        events = self._result(command)
        if isinstance(events, on.Extracted) and self._arrived(command, events):
            self._worker.note(events)
            return self._worker.sliced(command, events)
        return self._worker.execute(command)

    def _arrived(self, command: do.Extract, event: on.Extracted) -> bool:
        """Whether a helper answers what was asked, and its blobs are seen here: a network's folder may be late."""
        part = command.part
        asked = (event.device, event.round, event.attempt) == (part.device, command.basis.round, part.attempt)
        return asked and all(self._worker.store.has(digest) for digest in blobs_of(event.offer))

    def _result(self, command: do.Extract | do.Fold) -> on.Event | None:
        """What a helper answered; None where none was asked, or it failed."""
        expected, future, place = self._expected.pop(_key(command), (None, None, 0))
        if future is None or expected != command:
            return None
        try:
            answer = future.result(self._pool.patience_s)
        except LateError:
            self._expected.clear()  # helpers that hang are waited for once, and not for each thing they were asked
            return None
        except Exception as error:  # noqa: BLE001 - a helper may fail or be killed in any way
            self._complain(error)
            return None
        if isinstance(answer, pool_tasks.Made):
            if isinstance(self._worker.store, BucketStore):
                self._worker.store.learn(answer.objects)
            answer = answer.events[place]
        if isinstance(answer, pool_tasks.Checked) and isinstance(command, do.Fold):
            self._worker.limits.learn(self._worker.updates.update(command.contribution), answer.lengths)
            answer = answer.event
        event = answer
        return event if isinstance(event, on.Extracted | on.Folded | on.UpdateRejected) else None

    def _complain(self, error: Exception) -> None:
        """Log why helpers fail, once per cause: the worker does their work itself."""
        text = f"{type(error).__name__}: {reason(error)}"
        if text != self._complained and not isinstance(error, FedpruneError):
            self._complained = text
            log.warning("a helper process failed, and its work is done by the server itself: %s", text)

    def graphs(self) -> set[str]:
        """Digests of the graphs that offers of the latest rounds refer to."""
        return self._worker.graphs()

    def close(self) -> None:
        """Let the helpers go."""
        self._pool.close()


@contextmanager
def helped(
    worker: Worker | DistributedWorker, helpers: int, url: str = PROCESSES
) -> Iterator[Worker | DistributedWorker]:
    """A worker, with helpers if there are to be several processes.

    Args:
        worker: The worker.
        helpers: How many processes of this machine there are to be.
        url: The cluster that is to help instead.

    Raises:
        ClusterError: It can't be reached or used.
        MissingExtraError: Ray is not installed.
    """
    if not isinstance(worker, Worker) or (helpers == 1 and url == PROCESSES):
        yield worker
        return
    pool = ProcessPool(worker, helpers) if url == PROCESSES else RayPool(url, worker)
    with closing(DistributedWorker(worker, pool)) as crew:
        yield crew


def _key(command: do.Extract | do.Fold) -> _Key:
    if isinstance(command, do.Extract):
        return "extract", command.basis.round, command.part.device, command.part.attempt
    found = command.contribution
    return "fold", command.round, found.part.device, found.part.attempt
