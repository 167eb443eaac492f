"""A job's log told to a new coordinator, to see whether it ends where the job stands.

Nothing is worked out again, as `fedprune_server.maintenance.replay` does: what workers answered is taken from the log.
So this is quick, needs no updates, and proves less: that log and state belong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State, coordinate
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import FedpruneError
from fedprune.jobs.job import Job
from fedprune_export.importing import import_onnx
from fedprune_server.executor.worker import Worker
from fedprune_server.maintenance.finding import Finding, Weight
from fedprune_server.maintenance.inventory import Inventory
from fedprune_server.maintenance.replay import event_of
from fedprune_server.storage.state_folder import MODEL
from fedprune_server.storage.storage import Storage


def retold(folder: Path, storage: Storage, needs: Inventory) -> Iterator[Finding]:
    """Tell a log from its beginning, if it is there.

    Args:
        folder: The state folder; no server runs on it.
        storage: Its database.
        needs: What the job needs.

    Yields:
        Where the log ends elsewhere than the job: wrong where all settings are known to have stayed the same (an
        archived job), a note else.
    """
    log = storage.log.events()
    first = next(log, None)
    if first is None or first[0] != 1:
        at = "is empty" if first is None else f"begins with event {first[0]}"
        yield Finding(Weight.NOTE, f"the log {at}, so that it can't be compared with the state")
        return
    weight = Weight.WRONG if needs.archive else Weight.NOTE
    try:
        differing = _differing(folder, needs, chain([first], log))
    except FedpruneError as error:
        yield Finding(weight, f"the log can't be followed: {error}")
        return
    if differing:
        advice = "If the job's settings or this program's version never changed, restore a backup."
        yield Finding(weight, f"the log ends in another state: {', '.join(differing)}", advice)


def _differing(
    folder: Path, needs: Inventory, log: Iterator[tuple[int, float, str, dict[str, Any]]] | chain[Any]
) -> list[str]:
    path = folder / MODEL
    with storage_errors(f"can't read {path}"):
        raw = read_file(path)
    model, job = import_onnx(raw, str(needs.settings["name"])), Job.from_dict(needs.settings["job"])
    with TemporaryDirectory(prefix="fedprune-check-") as scratch:
        digest = Worker(job, model, BlobStore(Path(scratch), durable=False), None, None).initial()
    state = State(model=digest, architecture=model.architecture.digest)
    coordinator = coordinate(job, model.architecture, state, model.frozen)
    for number, at, kind, body in log:
        coordinator.handle(event_of(number, kind, body), at)
    told, saved = (json.loads(s.to_json()) for s in (state, needs.state))
    return sorted(k for k in told.keys() | saved.keys() if told.get(k) != saved.get(k))
