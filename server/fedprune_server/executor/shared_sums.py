"""A round's sums, made by many helpers: by blocks of tensors, by updates, or both."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fedprune.aggregation.partial_sums import PartialSums, blocks
from fedprune.coordination import commands as do
from fedprune_server.executor.pool_tasks import Addition, add_up
from fedprune_server.executor.process_pool import Pool
from fedprune_server.executor.worker import Worker

log = logging.getLogger("fedprune.server")

BLOCK = 2**20
"""Numbers of a model that are worth a task of their own."""

BATCH = 32
"""So many updates are added up together, as they come: sums of the whole model travel once for each batch."""

_LEAST = 4
"""Fewer updates than this are added here."""


@dataclass(frozen=True)
class _Batch:
    updates: tuple[do.Contribution, ...]
    sums: list[Future[Any]]


class SharedSums:
    """Has updates added up by helpers, and brings what they have summed into the worker's sums.

    What fails, for whatever reason, is not brought in; the worker then adds those updates itself when the round closes,
    and finds out which of them is at fault, if one is.

    A strategy whose aggregator looks at updates as a whole (robust means), or counts single elements, is left to the
    worker. One whose updates enter the sums as they came is split by blocks of tensors, of which a helper reads no more
    than it adds; another one (optimal transport) by updates.

    Args:
        worker: The server's own.
        pool: The helpers.
        block: Numbers that are worth a task.
        batch: Updates that are added up together.
    """

    def __init__(self, worker: Worker, pool: Pool, block: int = BLOCK, batch: int = BATCH) -> None:
        strategy = worker.strategy
        self._worker = worker
        self._pool = pool
        self._block = block
        self._batch = batch
        self._size = sum(int(t.size) for t in worker.model.tensors.values())
        self._by_tensor = strategy.aggregator.by_tensor
        self._as_trained = strategy.as_trained
        self._round: tuple[int, str] | None = None
        self._passed: list[do.Contribution] = []
        self._batches: list[_Batch] = []

    def takes(self, command: do.Fold) -> bool:
        """Whether helpers are to check and add this update."""
        worth = not self._as_trained or self._size >= 2 * self._block
        return self._by_tensor and worth and command.contribution.mask is None

    def passed(self, command: do.Fold) -> None:
        """Note an update that a helper has checked; it is added up with others."""
        if self._round != (command.round, command.model):
            self._round, self._passed, self._batches = (command.round, command.model), [], []
        devices = {c.part.device for c in (*self._passed, *(c for b in self._batches for c in b.updates))}
        if command.contribution.part.device in devices:
            return  # as the worker does: whether it is the one that counts is seen as the round closes
        self._passed.append(command.contribution)
        if len(self._passed) >= self._batch:
            close = do.Close(command.round, command.model, command.memory, (), ())
            self._batches += self._ordered(close, self._passed)
            self._passed = []
        self._collect(command, wait=False)

    def gather(self, command: do.Close) -> None:
        """Bring what helpers have summed into the worker's sums, before it closes the round."""
        counted = {c.part.device: c for c in command.contributions}
        started = self._batches if self._round == (command.round, command.model) else []
        self._passed = []
        self._batches = [b for b in started if all(counted.get(c.part.device) == c for c in b.updates)]
        round_ = self._worker.round_of(command)
        updates = {name: self._worker.updates.update(c) for name, c in counted.items()}
        if any(updates.get(device) != update for device, update in round_.included.items()):
            round_.reset()
        there = {*round_.included, *(c.part.device for b in self._batches for c in b.updates)}
        left = [c for c in command.contributions if c.part.device not in there]
        left = [c for c in left if self.takes(do.Fold(command.round, command.model, command.memory, c))]
        if len(left) >= _LEAST:
            self._batches += self._ordered(command, left)
        self._collect(command, wait=True)
        self._round, self._batches = None, []

    def _ordered(self, command: do.Close, updates: Sequence[do.Contribution]) -> list[_Batch]:
        """Have updates added up."""
        store = self._worker.store
        fold = self._worker.round_of(command).fold
        whole = frozenset(t.name for t in fold.shared)
        out = []
        plain = [c for c in updates if self._as_trained and c.codec is None]
        if plain:
            dealt = blocks(fold.shared, max(1, self._pool.size), self._block)
            refs = {digest: store.ref(digest) for c in plain for digest in (c.weights, c.sent)}
            out.append(self._submitted(command, plain, dealt, refs))
        others = [c for c in updates if c not in plain]
        share = max(_LEAST, -(-len(others) // max(1, self._pool.size)))
        groups = [others[at : at + share] for at in range(0, len(others), share)]
        return out + [self._submitted(command, group, [whole], None) for group in groups]

    def _submitted(
        self, command: do.Close, updates: Sequence[do.Contribution], dealt: Sequence[frozenset[str]], refs: Any
    ) -> _Batch:
        some = do.Close(command.round, command.model, command.memory, (), tuple(updates))
        return _Batch(some.contributions, [self._pool.submit(add_up, Addition(some, names, refs)) for names in dealt])

    def _collect(self, command: do.Fold | do.Close, *, wait: bool) -> None:
        """Take in the sums of batches that are done; of helpers that hang all together cost their patience once."""
        left = []
        patience = self._pool.patience_s
        until = None if patience is None else time.monotonic() + patience
        for batch in self._batches:
            if not wait and not all(f.done() for f in batch.sums):
                left.append(batch)
                continue
            try:
                parts = [f.result(None if until is None else max(0.0, until - time.monotonic())) for f in batch.sums]
                if not all(isinstance(part, PartialSums) for part in parts):
                    raise TypeError("no sums")
                updates = [self._worker.updates.update(c) for c in batch.updates]
                self._worker.round_of(command).merge(updates, parts)
            except Exception:
                log.warning("%d updates are added up by the server itself", len(batch.updates))
                log.debug("why", exc_info=True)
        self._batches = left
