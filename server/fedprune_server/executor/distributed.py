"""A worker whose helpers, other processes of this machine or of a Ray cluster, do a part of its commands.

Making a submodel may be expensive (optimal transport), a round makes one for every device, and a large model's updates
may be more than one process can sum in time. Helpers are given digests; they answer with an event, whose blobs are in
the store by then, or with sums, which are whole numbers. So the result doesn't depend on which process does what, or on
whether it is done twice. The worker itself does everything at which helpers fail.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from dataclasses import replace
from typing import Any, NamedTuple

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import FedpruneError, error_reason
from fedprune_server.executor import pool_tasks
from fedprune_server.executor.background import HeavyCommand
from fedprune_server.executor.offer_entries import blobs_of_offer
from fedprune_server.executor.shared_sums import BATCH_UPDATES, BLOCK_SIZE, SharedSums
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import TaskPool

log = logging.getLogger("fedprune.server")

# The most submodels in one task, and the fewest tasks for each helper if there are enough submodels.
_MAX_TASK_SUBMODELS, _MIN_TASKS_PER_HELPER = 16, 4

_CommandKey = tuple[str, int, str, int]


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
