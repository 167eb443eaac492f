"""The tasks of a worker pool, which run in processes of this machine or on others.

Each task is a function of a worker and one argument with commands, digests and names of tensors; blobs are read from
the store and checked. The result is an event, or sums. So it makes no difference which process does a task, or whether
it is done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedprune.aggregation.update_sums import PartialSums
from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore, BucketObjects
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.update_lengths import UpdateLengths, measure_update
from fedprune.core.errors import FedpruneError, StorageError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import kind_of_update_error
from fedprune.jobs.job import Job
from fedprune_export.pruning.model import Model
from fedprune_server.executor.worker import Worker

log = logging.getLogger("fedprune.server")

# A function of a worker and further arguments.
Task = Callable[..., Any]


@dataclass(frozen=True)
class WorkerSpec:
    """The parameters of a helper process's worker."""

    job: Job
    model: Model
    open_store: Callable[[], BlobStore]

    @classmethod
    def of(cls, worker: Worker) -> WorkerSpec:
        return cls(worker.job, worker.model, partial(_same_store, worker.store))

    @classmethod
    def remote(cls, worker: Worker) -> WorkerSpec:
        """For a helper on another machine."""
        return cls(worker.job, worker.model, worker.store.opener())

    def worker(self) -> Worker:
        """A worker on the same blobs. Raises `StorageError` if the folder isn't there, or the bucket can't be used."""
        return Worker(self.job, self.model, self.open_store())


def _same_store(store: BlobStore) -> BlobStore:
    """The store as it was pickled for a process of this machine."""
    return store


@dataclass(frozen=True)
class ExtractedBatch:
    """The offers of one task (None for a submodel that could not be made), and the keys of their blobs' objects in a
    bucket, if blobs are kept there."""

    events: tuple[on.Event | None, ...]
    objects: BucketObjects


@dataclass(frozen=True)
class Addition:
    """A task to add up some tensors of some updates: the contributions of the round's command. `refs` are the updates'
    blobs, so that only these tensors are read; None if whole updates are needed."""

    command: do.Close
    names: frozenset[str]
    refs: Mapping[str, BlobRef] | None


def extract_submodels(worker: Worker, commands: Sequence[do.Extract]) -> ExtractedBatch:
    """Make submodels. One that fails is None: the server's own worker tries it again, and raises the reason."""
    events = list[on.Event | None]()
    for command in commands:
        try:
            events.append(worker.execute(command))
        except Exception:  # noqa: PERF203
            # Not an error yet: the server's own worker tries again, and reports what it meets.
            log.debug("submodel of %s", command.part.device, exc_info=True)
            events.append(None)
    return ExtractedBatch(tuple(events), worker.store.take_new_objects())


@dataclass(frozen=True)
class CheckedUpdate:
    """The answer to a command whose update has passed its checks, and how far the update moved."""

    event: on.Folded
    lengths: UpdateLengths


def check_update(worker: Worker, command: do.FoldUpdate) -> CheckedUpdate | on.UpdateRejected:
    """Check an update, as far as that can be done without adding it to any sums. Raises `StorageError` if it can't be
    read."""
    contribution = command.contribution
    device, round_, attempt = contribution.part.device, contribution.basis.round, contribution.part.attempt
    try:
        report = worker.round_of(command).check(worker.updates.round_update(contribution))
    except StorageError:
        raise
    except FedpruneError as error:
        return on.UpdateRejected(device, round_, attempt, one_line(str(error)), kind_of_update_error(error))
    return CheckedUpdate(on.Folded(device, round_, attempt), measure_update(report))


def add_up_updates(worker: Worker, addition: Addition) -> PartialSums:
    """Add up some tensors of some updates. Raises `FedpruneError` if an update can't be added; the server's own worker
    then finds out which, and why."""
    command = addition.command
    round_ = worker.round_of(command)
    fold = round_.fold.narrow_to(addition.names)
    for contribution in command.contributions:
        if addition.refs is None:
            report = worker.updates.round_update(contribution).report()
            fold.check(report.trained.selection, report.trained.tensors)
            lifted = round_.lift_update(report)
        else:
            report = worker.updates.partial_report(contribution, addition.refs, addition.names)
            fold.check(report.trained.selection, report.trained.tensors)
            lifted = report.trained
        worker.strategy.aggregator.add(fold, report, lifted)
    return fold.partial_sums()
