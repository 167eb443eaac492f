"""A round's updates added up by the server alone, and by a Ray cluster of two processors on the same machine.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_sums

The cluster shares the machine's cores, so that seconds show what the way there costs; what a cluster takes off the
server are the seconds of its process.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import arguments, save, setting
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune_export.importing import load
from fedprune_export.pruning.model import Model
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.ray_pool import RayPool
from fedprune_server.executor.worker import Worker

MODEL = "benchmarks.shared_sums:vgg"
UPDATES = 32
PROCESSORS = 2
DISTINCT = 8


def vgg() -> Any:
    """The convolutions of VGG-11, with batch normalisation."""
    from torch import nn

    layers: list[Any] = []
    channels = 3
    for width in (64, 128, 256, 256, 512, 512, 512, 512):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    net.input_shape = (3, 32, 32)  # type: ignore[assignment]
    return net


def round_of(worker: Worker) -> tuple[list[do.Fold], do.Close]:
    """A round of whole updates; the same few files stand for all, under names of their own."""
    start = worker.initial()
    scored = worker.execute(do.Score(1, start, {}, ("a",)))
    assert isinstance(scored, on.Scored)
    basis, tensors = do.Basis(1, start, scored.ranking), tensorfile.decode(worker.store.read(start))
    stored = []
    for k in range(DISTINCT):
        moved = {n: v + np.float32(1e-3 * (k + 1)) for n, v in tensors.items()}
        stored.append(worker.store.put(tensorfile.encode(moved)).sha256)
    found = []
    for k in range(UPDATES):
        part = do.Part(f"d{k:03d}", 1, worker.architecture.sizes, 1.0, 100 + k, None)
        found.append(do.Contribution(basis, part, start, None, stored[k % DISTINCT], 100 + k, 10))
    names = tuple(c.part.device for c in found)
    return [do.Fold(1, start, {}, c) for c in found], do.Close(1, start, {}, names, tuple(found))


@contextmanager
def cluster(processors: int) -> Iterator[str]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(processors):
        made.add_node(num_cpus=1)
    try:
        yield f"ray:{made.address}"
    finally:
        made.shutdown()


def measured(
    worker: Worker | DistributedWorker, folds: list[do.Fold], close: do.Close
) -> tuple[dict[str, Any], on.Event]:
    before, cpu = time.monotonic(), _own()
    worker.expect(folds)
    for fold in folds:
        assert isinstance(worker.execute(fold), on.Folded)
    came, came_cpu = time.monotonic(), _own()
    event = worker.execute(close)
    return {
        "coming_s": came - before,
        "closing_s": time.monotonic() - came,
        "server_cpu_coming_s": came_cpu - cpu,
        "server_cpu_closing_s": _own() - came_cpu,
    }, event


def _own() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = arguments(__doc__)
    model: Model = load(MODEL)
    size = sum(v.size for v in model.tensors.values())
    rows = []
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder) / "blobs", durable=False)

        def fresh() -> Worker:
            return Worker(Job(strategy="plain"), model, store)

        folds, close = round_of(fresh())
        row, expected = measured(fresh(), folds, close)
        rows.append({"way": "the server alone", **row})
        print(rows[-1], flush=True)
        with cluster(PROCESSORS) as url:
            crew = DistributedWorker(fresh(), RayPool(url, fresh()))
            try:
                few = 2 * PROCESSORS
                measured(crew, folds[:few], replace(close, contributions=close.contributions[:few]))  # processes start
                row, event = measured(crew, folds, close)
            finally:
                crew.close()
        assert event == expected, "other bits"
        rows.append({"way": f"a cluster of {PROCESSORS} processors", **row})
        print(rows[-1], flush=True)
    body = {"setting": setting("ray"), "parameters": size, "updates": UPDATES, "rows": rows}
    save(options.out or "shared_sums", body)


if __name__ == "__main__":
    main()
