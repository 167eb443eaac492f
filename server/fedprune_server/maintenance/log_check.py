"""Compares a job's log with its state: a new coordinator that handles the same events must reach the same state."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import events as on
from fedprune.coordination import make_coordinator
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, StorageError
from fedprune.jobs.job import Job
from fedprune_export.importing import import_onnx
from fedprune_server.config.stored_code import stored_job
from fedprune_server.executor.worker import Worker
from fedprune_server.maintenance.finding import Finding, Severity
from fedprune_server.maintenance.job_needs import JobNeeds
from fedprune_server.storage.folder_layout import MODEL_FILE
from fedprune_server.storage.storage import Storage

_EVENT_TYPES: dict[str, Callable[..., on.Event]] = {kind.__name__: kind for kind in get_args(on.Event)}


def check_log(folder: Path, storage: Storage, needs: JobNeeds, allowed: Collection[str] = ()) -> Iterator[Finding]:
    """Replay a job's log in a new coordinator, and report the parts of the state that differ.

    Workers' results are taken from the log, so that this is quick and needs no updates; it proves only that log and
    state belong together.

    No server may run on the folder. `allowed` names functions that may be called, such as a user's own strategy.
    """
    log = storage.log.events()
    first = next(log, None)
    if first is None or first[0] != 1:  # the server deletes the oldest events of a long job
        beginning = "is empty" if first is None else f"begins with event {first[0]}"
        yield Finding(Severity.NOTE, f"the log {beginning}, so that it can't be compared with the state")
        return
    try:
        job = stored_job(needs.settings, allowed, str(folder))
    except ConfigError as error:
        yield Finding(Severity.NOTE, f"the log isn't compared with the state: {error}")
        return
    try:
        different_keys = _different_keys(folder, needs, job, chain([first], log))
    except FedpruneError as error:
        yield Finding(Severity.NOTE, f"the log can't be followed: {error}")
        return
    if different_keys:
        advice = (
            "This is expected if the job's settings or fedprune's version have changed since the job began; the server "
            "logs changed settings when it starts. If neither has changed, restore a backup."
        )
        yield Finding(Severity.NOTE, f"the log ends in another state: {', '.join(different_keys)}", advice)


def _different_keys(
    folder: Path, needs: JobNeeds, job: Job, log: Iterator[tuple[int, float, str, dict[str, Any]]] | chain[Any]
) -> list[str]:
    path = folder / MODEL_FILE
    with storage_errors(f"can't read {path}"):
        raw = read_file(path)
    model = import_onnx(raw, str(needs.settings["name"]))
    with TemporaryDirectory(prefix="fedprune-check-") as scratch:
        state = Worker(job, model, BlobStore(Path(scratch), durable=False), None, None).begin()
    coordinator = make_coordinator(job, model.architecture, state, model.frozen)
    for number, at, kind, body in log:
        try:
            event = _EVENT_TYPES[kind](**body)
        except (KeyError, TypeError) as error:
            raise StorageError(f"event {number} of the log is of another version ({kind}: {error})") from error
        coordinator.handle(event, at)
    replayed, stored = (json.loads(s.to_json()) for s in (state, needs.state))
    return sorted(k for k in replayed.keys() | stored.keys() if replayed.get(k) != stored.get(k))
