"""A worker whose helpers, other processes of this machine or of a Ray cluster, do a part of its commands.

Making a submodel may be expensive (optimal transport), a round makes one for every device, and a large model's updates
may be more than one process can sum in time. Helpers are given digests; they answer with an event, whose blobs are in
the store by then, or with sums, which are whole numbers. So the result doesn't depend on which process does what, or on
whether it is done twice. The worker itself does everything at which helpers fail.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedprune.aggregation.update_sums import PartialSums, tensor_blocks
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, error_reason
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.background import HeavyCommand
from fedprune_server.executor.offer_entries import blobs_of_offer
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import TaskPool

log = logging.getLogger("fedprune.server")

# The most submodels in one task, and the fewest tasks for each helper if there are enough submodels.
_MAX_TASK_SUBMODELS, _MIN_TASKS_PER_HELPER = 16, 4

_CommandKey = tuple[str, int, str, int]


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


class _ExpectedCommand(NamedTuple):
    """A command that a helper carries out, and the position of its result in the answer."""

    command: do.Command
    answer: Future[Any]
    position: int = 0


class DistributedWorker:
    """Carries out commands as its worker does; helpers begin in advance with the commands that are expected.

    The worker carries out all other commands, and those at which a helper fails: so errors are its own. Summing the
    updates of a model of `block` numbers or more is worth a task of its own; `batch` updates are summed together as
    they arrive."""

    def __init__(
        self, worker: Worker, pool: TaskPool[Worker], *, block: int = BLOCK_SIZE, batch: int = BATCH_UPDATES
    ) -> None:
        self._worker = worker
        self._pool = pool
        self._shared_sums = SharedSums(worker, pool, block, batch) if pool.adds_updates else None
        self._expected: dict[_CommandKey, _ExpectedCommand] = {}
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
            self._expected |= {_key(c): _ExpectedCommand(c, future, i) for i, c in enumerate(chunk)}
        sums = self._shared_sums
        for command in commands:
            if isinstance(command, do.FoldUpdate) and sums is not None and sums.accepts(command):
                answer = self._pool.submit(pool_tasks.check_update, command)
                self._expected[_key(command)] = _ExpectedCommand(command, answer)

    def _offer_key(self, command: do.Extract) -> Hashable:
        """The key of an offer for helpers. For equal keys one offer is made, and the worker gives it to all devices."""
        try:
            return self._worker.offers.shared_key(command) or _key(command)
        except Exception:  # noqa: BLE001 - raised again where the command is carried out
            return _key(command)

    def execute(self, command: HeavyCommand) -> on.Event:
        """Carry out one command. Raises `FedpruneError` if it can't be done."""
        if isinstance(command, do.Extract):
            offer = self._helper_answer(command)
            if not (isinstance(offer, on.Extracted) and self._is_usable(command, offer)):
                return self._worker.execute(command)
            self._worker.offers.note(command, offer)
            return offer
        if self._shared_sums is not None and isinstance(command, do.FoldUpdate):
            event = self._helper_answer(command)
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
            self._shared_sums.merge_all(replace(command, contributions=limited_contributions))
        return self._worker.execute(command)

    def _is_usable(self, command: do.Extract, event: on.Extracted) -> bool:
        """Whether a helper's answer fits the command, and its blobs are visible here: a network's folder may lag."""
        device_part = command.part
        if (event.device, event.round, event.attempt) != (device_part.device, command.basis.round, device_part.attempt):
            return False
        return all(self._worker.store.has(digest) for digest in blobs_of_offer(event.offer))

    def _helper_answer(self, command: do.Extract | do.FoldUpdate) -> on.Event | None:
        """A helper's answer; None if no helper was asked, or it failed."""
        expected = self._expected.pop(_key(command), None)
        if expected is None or expected.command != command:
            return None
        try:
            answer = expected.answer.result(self._pool.patience_s)
        except LateError:
            self._expected.clear()  # hanging helpers are waited for once, not for each of their tasks
            return None
        except Exception as error:  # noqa: BLE001 - a helper may fail or be killed in any way
            # Log why helpers fail, once per cause: the worker does their work itself.
            text = f"{type(error).__name__}: {error_reason(error)}"
            if text != self._last_complaint and not isinstance(error, FedpruneError):
                self._last_complaint = text
                log.warning("a helper process failed, and its work is done by the server itself: %s", text)
            return None
        if isinstance(answer, pool_tasks.ExtractedBatch):
            self._worker.store.note_objects(answer.objects)
            answer = answer.events[expected.position]
        if isinstance(answer, pool_tasks.CheckedUpdate) and isinstance(command, do.FoldUpdate):
            self._worker.limits.note_lengths(self._worker.updates.round_update(command.contribution), answer.lengths)
            answer = answer.event
        return answer if isinstance(answer, on.Extracted | on.Folded | on.UpdateRejected) else None

    def graph_digests(self) -> set[str]:
        return self._worker.graph_digests()

    def close(self) -> None:
        self._pool.close()


def _key(command: do.Extract | do.FoldUpdate) -> _CommandKey:
    if isinstance(command, do.Extract):
        return "extract", command.basis.round, command.part.device, command.part.attempt
    contribution = command.contribution
    return "fold", command.round, contribution.part.device, contribution.part.attempt
