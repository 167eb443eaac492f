"""A round of stored updates, for tests of who adds them up."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune_export.pruning.model import Model
from fedprune_server.executor.pool_tasks import Task, WorkerSpec
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import TaskPool

DENSITIES = (1.0, 0.5, 0.25, 1.0, 0.75, 0.5, 0.25, 1.0, 0.5)

STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {"strategy": "plain"},
    "momentum and filling": {"strategy": "fedprune"},
    "evidence": {"strategy": "ca-hfp"},
    "moves of earlier models": {"strategy": "fedbuff"},
    "transport": {"strategy": "subflot"},
    "own parts": {"strategy": "fedper"},
}


class Helpers(TaskPool[Worker]):
    """A pool whose tasks are done at once, by a worker of its own, each by another process for all that it knows."""

    adds_updates = True
    size = 3

    def __init__(self, worker: Worker) -> None:
        self.done: list[tuple[Task, Any]] = []
        self.fails: Callable[[Task, Any], bool] = lambda *_: False
        self.changed: Callable[[Any], Any] = lambda result: result
        self._worker = WorkerSpec.of(worker).worker()

    def submit(self, task: Task, *arguments: Any) -> Future[Any]:
        (argument,) = arguments
        future: Future[Any] = Future()
        self.done.append((task, argument))
        try:
            if self.fails(task, argument):
                raise RuntimeError("this helper has died")
            future.set_result(self.changed(task(self._worker, argument)))
        except Exception as error:  # noqa: BLE001 - as a real pool
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass

    def count(self, task: Task) -> int:
        return sum(done is task for done, _ in self.done)


def worker(model: Model, folder: Path, settings: dict[str, Any]) -> Worker:
    return Worker(Job.from_dict({"name": "t", **settings}), model, BlobStore(folder, durable=False))


def round_of(w: Worker, spoilt: str = "", far: str = "") -> tuple[list[do.FoldUpdate], do.Close]:
    """A round's updates as they come, and its end.

    The device `spoilt` sends numbers that are never accepted, `far` an update five times as long as the others'.
    """
    start = w.put_initial_model()
    names = tuple(f"d{k}" for k in range(len(DENSITIES)))
    scored = w.execute(do.Score(1, start, {}, names))
    assert isinstance(scored, on.Scored)
    basis = do.Basis(1, start, scored.ranking, scored.order)
    contributions = []
    for k, name in enumerate(names):
        device_part = do.DevicePart(name, 1, widths_at(w.architecture, DENSITIES[k]), DENSITIES[k], 10 + k, None)
        extracted = w.execute(do.Extract(basis, device_part))
        assert isinstance(extracted, on.Extracted)
        offer, dice = extracted.offer, np.random.default_rng(k)
        withheld = w.updates.withheld_names(basis, device_part)
        update = {
            n: (v + (0.5 if name == far else 0.1) * dice.standard_normal(v.shape)).astype(np.float32)
            for n, v in tensorfile.decode(w.store.read(offer["weights"]["sha256"])).items()
            if n not in withheld
        }
        for n, v in update.items():
            if n.endswith("var"):
                np.abs(v, out=v)
        if name == spoilt:
            next(iter(update.values())).reshape(-1)[0] = np.nan
        stored = w.store.put(tensorfile.encode(update)).sha256
        sent, mask = offer["weights"]["sha256"], offer["mask"]["sha256"] if "mask" in offer else None
        contributions.append(
            do.Contribution(basis, device_part, sent, mask, stored, 10 + k, 3, tuple(offer["widths"]), offer["ranking"])
        )
    return [do.FoldUpdate(1, start, {}, c) for c in contributions], do.Close(1, start, {}, names, tuple(contributions))
