"""A worker that shares its work with other processes: of this machine, or of a Ray cluster.

Making a submodel may be expensive (optimal transport), a round makes one for every device, and a large model's updates
may be more than one process can sum in time. Helpers are given digests; they answer with an event, whose blobs are in
the store by then, or with sums, which are whole numbers. So the result doesn't depend on which process does what, or on
whether it is done twice; what helpers fail at, the worker does itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedprune.aggregation.update_sums import PartialSums, tensor_blocks
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, error_reason
from fedprune_server.config.cluster_url import PROCESSES
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.background import HeavyCommand
from fedprune_server.executor.offers import offer_blobs
from fedprune_server.executor.pool_tasks import WorkerSpec
from fedprune_server.executor.ray_pool import RayPool
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import ProcessPool, TaskPool

log = logging.getLogger("fedprune.server")

# Numbers of a model that are worth a task of their own.
BLOCK_SIZE = 2**20

# Updates that are summed together as they arrive: sums of the whole model travel once for each batch.
BATCH_UPDATES = 32

# Fewer updates than this are added by the worker.
_MIN_SHARED_UPDATES = 4

# The most submodels in one task, and the fewest tasks for each helper if there are enough submodels.
_MAX_TASK_SUBMODELS, _MIN_TASKS_PER_HELPER = 16, 4

_CommandKey = tuple[str, int, str, int]


class DistributedWorker:
    """Carries out commands as its worker does; helpers begin with those that are expected.

    Args:
        worker: Does everything else, and what a helper fails at, so that errors are its own.
        block: Numbers of a model from which on summing them is worth a task of its own.
        batch: Updates that are summed together as they arrive.
    """

    def __init__(
        self, worker: Worker, pool: TaskPool[Worker], *, block: int = BLOCK_SIZE, batch: int = BATCH_UPDATES
    ) -> None:
        self._worker = worker
        self._pool = pool
        self._shared_sums = SharedSums(worker, pool, block, batch) if pool.adds_updates else None
        self._expected: dict[_CommandKey, tuple[do.Command, Future[Any], int]] = {}
        self._last_complaint = ""

    def expect(self, commands: Sequence[do.Command]) -> None:
        """Let helpers begin with commands that will be carried out next."""
        new_extracts = [c for c in commands if isinstance(c, do.Extract) and _key(c) not in self._expected]
        extracts = list({self._offer_key(c): c for c in reversed(new_extracts)}.values())[::-1]  # the first of each key
        group = 1
        if self._pool.adds_updates:
            # On a cluster a task costs a round trip, which several small submodels share; and each helper gets some
            # tasks, so that a slow one doesn't hold up the round.
            tasks = _MIN_TASKS_PER_HELPER * max(1, self._pool.size)
            group = max(1, min(_MAX_TASK_SUBMODELS, math.ceil(len(extracts) / tasks)))
        for start in range(0, len(extracts), group):
            chunk = tuple(extracts[start : start + group])
            future = self._pool.submit(pool_tasks.extract_submodels, chunk)
            self._expected |= {_key(c): (c, future, i) for i, c in enumerate(chunk)}
        sums = self._shared_sums
        for command in commands:
            if isinstance(command, do.FoldUpdate) and sums is not None and sums.accepts(command):
                self._expected[_key(command)] = (command, self._pool.submit(pool_tasks.check_update, command), 0)

    def _offer_key(self, command: do.Extract) -> Hashable:
        """The key of an offer for helpers. For equal keys one offer is made, and the worker gives it to all devices."""
        try:
            return self._worker.shared_key(command) or _key(command)
        except Exception:  # noqa: BLE001 - raised again where the command is carried out
            return _key(command)

    def execute(self, command: HeavyCommand) -> on.Event:
        """Carry out one command. Raises `FedpruneError` if it can't be done."""
        if isinstance(command, do.Extract):
            return self._extract(command)
        if self._shared_sums is not None and isinstance(command, do.FoldUpdate):
            event = self._result(command)
            if isinstance(event, on.Folded):
                self._shared_sums.add_checked(command)
                return event
            if isinstance(event, on.UpdateRejected):
                return event
        if self._shared_sums is not None and isinstance(command, do.Close) and not command.sums:
            updates = [self._worker.updates.round_update(c) for c in command.contributions]
            shares = {u.device: u.shares for u in self._worker.round_of(command).limit_updates(updates).updates}
            counted_contributions = (c for c in command.contributions if c.part.device in shares)
            limited_contributions = tuple(replace(c, shares=shares[c.part.device]) for c in counted_contributions)
            self._shared_sums.gather(replace(command, contributions=limited_contributions))
        return self._worker.execute(command)

    def _extract(self, command: do.Extract) -> on.Event:
        event = self._result(command)
        if isinstance(event, on.Extracted) and self._is_usable(command, event):
            self._worker.note_offer(command, event)
            return event
        return self._worker.execute(command)

    def _is_usable(self, command: do.Extract, event: on.Extracted) -> bool:
        """Whether a helper's answer fits the command, and its blobs are visible here: a network's folder may lag."""
        device_part = command.part
        if (event.device, event.round, event.attempt) != (device_part.device, command.basis.round, device_part.attempt):
            return False
        return all(self._worker.store.has(digest) for digest in offer_blobs(event.offer))

    def _result(self, command: do.Extract | do.FoldUpdate) -> on.Event | None:
        """A helper's answer; None if no helper was asked, or it failed."""
        expected, future, position = self._expected.pop(_key(command), (None, None, 0))
        if future is None or expected != command:
            return None
        try:
            answer = future.result(self._pool.patience_s)
        except LateError:
            self._expected.clear()  # hanging helpers are waited for once, not for each of their tasks
            return None
        except Exception as error:  # noqa: BLE001 - a helper may fail or be killed in any way
            self._complain(error)
            return None
        if isinstance(answer, pool_tasks.ExtractedBatch):
            self._worker.store.note_objects(answer.objects)
            answer = answer.events[position]
        if isinstance(answer, pool_tasks.CheckedUpdate) and isinstance(command, do.FoldUpdate):
            self._worker.limits.note_lengths(self._worker.updates.round_update(command.contribution), answer.lengths)
            answer = answer.event
        event = answer
        return event if isinstance(event, on.Extracted | on.Folded | on.UpdateRejected) else None

    def _complain(self, error: Exception) -> None:
        """Log why helpers fail, once per cause: the worker does their work itself."""
        text = f"{type(error).__name__}: {error_reason(error)}"
        if text != self._last_complaint and not isinstance(error, FedpruneError):
            self._last_complaint = text
            log.warning("a helper process failed, and its work is done by the server itself: %s", text)

    def graph_digests(self) -> set[str]:
        return self._worker.graph_digests()

    def close(self) -> None:
        self._pool.close()


def helper_processes(worker: Worker, size: int) -> TaskPool[Worker]:
    """Processes of this machine that help a worker, each with the model in its memory."""
    return ProcessPool(size, WorkerSpec.of(worker).worker, restarts=True)


@contextmanager
def with_helpers(
    worker: Worker | DistributedWorker, helpers: int, url: str = PROCESSES
) -> Iterator[Worker | DistributedWorker]:
    """A worker that helpers support, if there are to be several processes.

    Args:
        helpers: How many processes of this machine there are to be.
        url: The cluster that is to help instead.

    Raises:
        ClusterError: It can't be reached or used.
        MissingExtraError: Ray is not installed.
    """
    if not isinstance(worker, Worker) or (helpers == 1 and url == PROCESSES):
        yield worker
        return
    pool = helper_processes(worker, helpers) if url == PROCESSES else RayPool(url, worker)
    with closing(DistributedWorker(worker, pool)) as distributed:
        yield distributed


@dataclass(frozen=True)
class _Batch:
    updates: tuple[do.Contribution, ...]
    sums: list[Future[Any]]


class SharedSums:
    """Has helpers sum updates, and merges their sums into the worker's round.

    Sums that fail for any reason are not merged; the worker then adds those updates itself when the round closes, and
    finds out which of them is at fault.

    A strategy whose aggregator reads whole updates (robust means), or counts single elements, is left to the worker. If
    updates are summed as they were trained, each helper sums one block of tensors of all updates, and reads only that
    block. Otherwise (optimal transport) each helper sums whole updates, some of them.
    """

    def __init__(self, worker: Worker, pool: TaskPool[Worker], block: int, batch: int) -> None:
        strategy = worker.strategy
        self._worker = worker
        self._pool = pool
        self._block = block
        self._batch = batch
        self._size = sum(int(t.size) for t in worker.model.tensors.values())
        self._by_tensor = strategy.aggregator.is_per_tensor
        self._sums_as_trained = strategy.has_plain_reconstruction
        self._round: tuple[int, str] | None = None
        self._checked_updates: list[do.Contribution] = []
        self._batches: list[_Batch] = []

    def accepts(self, command: do.FoldUpdate) -> bool:
        """Whether helpers are to check and add this update."""
        is_worth_sharing = not self._sums_as_trained or self._size >= 2 * self._block
        return self._by_tensor and is_worth_sharing and command.contribution.mask is None

    def add_checked(self, command: do.FoldUpdate) -> None:
        """Note an update that a helper has checked; it is added up with others."""
        if self._round != (command.round, command.model):
            self._round, self._checked_updates, self._batches = (command.round, command.model), [], []
        devices = {c.part.device for c in (*self._checked_updates, *(c for b in self._batches for c in b.updates))}
        if command.contribution.part.device in devices:
            return  # as in the worker: which of a device's updates counts is decided when the round closes
        self._checked_updates.append(command.contribution)
        if len(self._checked_updates) >= self._batch:
            close = do.Close(command.round, command.model, command.memory, (), ())
            self._batches += self._submit_updates(close, self._checked_updates)
            self._checked_updates = []
        self._collect(command, wait=False)

    def gather(self, command: do.Close) -> None:
        """Merge the helpers' sums into the worker's, before it closes the round."""
        counted = {c.part.device: c for c in command.contributions}
        batches = self._batches if self._round == (command.round, command.model) else []
        self._checked_updates = []
        self._batches = [b for b in batches if all(counted.get(c.part.device) == c for c in b.updates)]
        round_ = self._worker.round_of(command)
        updates = {name: self._worker.updates.round_update(c) for name, c in counted.items()}
        # An update that is already in the sums has been replaced or refused since: sums can't be undone, so they begin
        # again.
        if any(updates.get(device) != update for device, update in round_.included.items()):
            round_.reset()
        summed_devices = {*round_.included, *(c.part.device for b in self._batches for c in b.updates)}
        unsummed = [c for c in command.contributions if c.part.device not in summed_devices]
        unsummed = [c for c in unsummed if self.accepts(do.FoldUpdate(command.round, command.model, command.memory, c))]
        if len(unsummed) >= _MIN_SHARED_UPDATES:
            self._batches += self._submit_updates(command, unsummed)
        self._collect(command, wait=True)
        self._round, self._batches = None, []

    def _submit_updates(self, command: do.Close, updates: Sequence[do.Contribution]) -> list[_Batch]:
        """Submit the addition of updates."""
        store = self._worker.store
        fold = self._worker.round_of(command).fold
        all_names = frozenset(t.name for t in fold.shared)
        batches = []
        plain_updates = [c for c in updates if self._sums_as_trained and c.codec is None]
        if plain_updates:
            name_blocks = tensor_blocks(fold.shared, max(1, self._pool.size), self._block)
            refs = {digest: store.ref(digest) for c in plain_updates for digest in (c.weights, c.sent)}
            batches.append(self._submit_batch(command, plain_updates, name_blocks, refs))
        other_updates = [c for c in updates if c not in plain_updates]
        group_size = max(_MIN_SHARED_UPDATES, -(-len(other_updates) // max(1, self._pool.size)))
        groups = [other_updates[start : start + group_size] for start in range(0, len(other_updates), group_size)]
        return batches + [self._submit_batch(command, group, [all_names], None) for group in groups]

    def _submit_batch(
        self, command: do.Close, updates: Sequence[do.Contribution], name_blocks: Sequence[frozenset[str]], refs: Any
    ) -> _Batch:
        addition = do.Close(command.round, command.model, command.memory, (), tuple(updates))
        tasks = [pool_tasks.Addition(addition, names, refs) for names in name_blocks]
        return _Batch(addition.contributions, [self._pool.submit(pool_tasks.add_up_updates, task) for task in tasks])

    def _collect(self, command: do.FoldUpdate | do.Close, *, wait: bool) -> None:
        """Merge the sums of finished batches; if `wait`, of all, within one `patience_s` for all helpers together."""
        unfinished = []
        patience = self._pool.patience_s
        until = None if patience is None else time.monotonic() + patience
        for batch in self._batches:
            if not wait and not all(f.done() for f in batch.sums):
                unfinished.append(batch)
                continue
            try:
                partial_sums = [
                    f.result(None if until is None else max(0.0, until - time.monotonic())) for f in batch.sums
                ]
                if not all(isinstance(partial, PartialSums) for partial in partial_sums):
                    raise TypeError("no sums")
                updates = [self._worker.updates.round_update(c) for c in batch.updates]
                self._worker.round_of(command).merge(updates, partial_sums)
            except Exception:
                log.warning("%d updates are added up by the server itself", len(batch.updates))
                log.debug("why", exc_info=True)
        self._batches = unfinished


def _key(command: do.Extract | do.FoldUpdate) -> _CommandKey:
    if isinstance(command, do.Extract):
        return "extract", command.basis.round, command.part.device, command.part.attempt
    contribution = command.contribution
    return "fold", command.round, contribution.part.device, contribution.part.attempt
