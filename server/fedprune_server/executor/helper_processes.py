"""Starts the helpers of a worker: processes of this machine, or of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from fedprune_server.config.cluster_url import PROCESSES
from fedprune_server.executor.distributed import DistributedWorker
from fedprune_server.executor.pool_tasks import WorkerSpec
from fedprune_server.executor.ray_pool import RayPool
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import ProcessPool, TaskPool


def helper_processes(worker: Worker, size: int) -> TaskPool[Worker]:
    """Processes of this machine that help a worker, each with the model in its memory."""
    return ProcessPool(size, WorkerSpec.of(worker).worker, restarts=True)


@contextmanager
def with_helpers(
    worker: Worker | DistributedWorker, helpers: int, url: str = PROCESSES
) -> Iterator[Worker | DistributedWorker]:
    """A worker with helpers: `helpers` processes of this machine, or the cluster at `url`. It is the worker itself if
    one process is enough. Raises `ClusterError` if the cluster can't be reached or used, and `MissingExtraError` if Ray
    is not installed."""
    if not isinstance(worker, Worker) or (helpers == 1 and url == PROCESSES):
        yield worker
        return
    pool = helper_processes(worker, helpers) if url == PROCESSES else RayPool(url, worker)
    with closing(DistributedWorker(worker, pool)) as distributed:
        yield distributed
