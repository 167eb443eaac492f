"""Has helper processes sum the updates of a round, and merges their sums into the round of the worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fedprune.aggregation.update_sums import PartialSums, tensor_blocks
from fedprune.coordination import commands as do
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import TaskPool

log = logging.getLogger("fedprune.server")

# Numbers of a model that are worth a task of their own.
BLOCK_SIZE = 2**20

# Updates that are summed together as they arrive: sums of the whole model travel once for each batch.
BATCH_UPDATES = 32

# Fewer updates than this are added by the worker.
_MIN_SHARED_UPDATES = 4


@dataclass(frozen=True)
class _Batch:
    """Updates that helpers sum together, and their sums, which may not be there yet."""

    updates: tuple[do.Contribution, ...]
    sums: list[Future[Any]]


class SharedSums:
    """Has helpers sum the updates of a round. Call `add_checked` for each update that arrives, then `merge_all`.

    Sums that fail for any reason are not merged; the worker then adds those updates itself when the round closes, and
    finds out which of them is at fault. If updates are summed as they were trained, each helper sums one block of
    tensors of all updates, and reads only that block. Otherwise (optimal transport) it sums some whole updates.
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
        """Whether helpers check and sum this update. If a strategy's aggregator reads whole updates (robust means), or
        counts single elements, the worker does."""
        is_worth_sharing = not self._sums_as_trained or self._size >= 2 * self._block
        return self._by_tensor and is_worth_sharing and command.contribution.mask is None

    def add_checked(self, command: do.FoldUpdate) -> None:
        """Note an update that a helper has checked. Each `BATCH_UPDATES` of them are summed together."""
        if self._round != (command.round, command.model):
            self._round, self._checked_updates, self._batches = (command.round, command.model), [], []
        devices = {c.part.device for c in (*self._checked_updates, *(c for b in self._batches for c in b.updates))}
        if command.contribution.part.device in devices:
            return  # only at the close is it known which of a device's updates counts; the worker ignores it, too
        self._checked_updates.append(command.contribution)
        if len(self._checked_updates) >= self._batch:
            self._batches += self._submit_updates(command, self._checked_updates)
            self._checked_updates = []
        self._merge_finished(command, wait=False)

    def merge_all(self, command: do.Close) -> None:
        """Merge the sums of all counted updates into the worker's round, before the worker closes it."""
        counted = {c.part.device: c for c in command.contributions}
        batches = self._batches if self._round == (command.round, command.model) else []
        self._checked_updates = []
        self._batches = [b for b in batches if all(counted.get(c.part.device) == c for c in b.updates)]
        unsummed = self._contributions_without_sum(command)
        if len(unsummed) >= _MIN_SHARED_UPDATES:
            self._batches += self._submit_updates(command, unsummed)
        self._merge_finished(command, wait=True)
        self._round, self._batches = None, []

    def _contributions_without_sum(self, command: do.Close) -> list[do.Contribution]:
        """The counted updates for helpers that no batch and no sum of the worker has."""
        round_ = self._worker.round_of(command)
        updates = {c.part.device: self._worker.updates.round_update(c) for c in command.contributions}
        # An update that is already in the sums has been replaced or refused since: sums can't be undone, so they begin
        # again.
        if any(updates.get(device) != update for device, update in round_.included.items()):
            round_.reset()
        summed = {*round_.included, *(c.part.device for b in self._batches for c in b.updates)}
        folds = [do.FoldUpdate(command.round, command.model, command.memory, c) for c in command.contributions]
        return [f.contribution for f in folds if f.contribution.part.device not in summed and self.accepts(f)]

    def _submit_updates(self, command: do.FoldUpdate | do.Close, updates: Sequence[do.Contribution]) -> list[_Batch]:
        """Have helpers sum updates: plain ones by blocks of tensors, others (with a codec or transport) by groups."""
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
        self,
        command: do.FoldUpdate | do.Close,
        updates: Sequence[do.Contribution],
        name_blocks: Sequence[frozenset[str]],
        refs: Any,
    ) -> _Batch:
        # A command only to name the round and its updates: it closes nothing.
        carrier = do.Close(command.round, command.model, command.memory, participants=(), contributions=tuple(updates))
        tasks = [pool_tasks.Addition(carrier, names, refs) for names in name_blocks]
        return _Batch(carrier.contributions, [self._pool.submit(pool_tasks.add_up_updates, task) for task in tasks])

    def _merge_finished(self, command: do.FoldUpdate | do.Close, *, wait: bool) -> None:
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
