"""The driver process that runs a worker pool's tasks on a Ray cluster, and the functions that run on its machines."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from fedprune import __version__
from fedprune.aggregation.update_sums import PartialSums
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import FedpruneError, error_reason
from fedprune_server.executor.pool_tasks import Task, WorkerSpec
from fedprune_server.executor.worker import Worker
from fedprune_server.process.child_side import end_with_parent

# Retries of a task whose machine or process has died.
_MAX_RETRIES = 3

_POLL_INTERVAL_S, _SIZE_INTERVAL_S = 0.01, 5.0
# A cluster that has had no processors for this long is lost.
_EMPTY_TIMEOUT_S = 30.0

_PROBE_TIMEOUT_S = 60.0

# In a process of the cluster: its worker, and of which server.
_worker: tuple[str, Worker] | None = None


def runtime_env() -> dict[str, Any]:
    """The modules that processes of a cluster can import: all of this process, also those of the current folder."""
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}


def run_driver(parent: int, address: str, settings: WorkerSpec, probe: str, connection: Connection) -> None:
    """Submit tasks to a cluster until the other end of the pipe is closed; runs in a process of its own.

    It receives tasks: a number, a function and its arguments. It sends pairs of a kind and a value: `size` and the
    cluster's processors; `done` and a task's number, followed by the result; `failed` and a task's number, followed by
    a text; `lost` and the reason if the cluster can't be used.
    """
    end_with_parent(parent)
    # Redirect the output of this process: Ray's own log is in Ray's folder.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        _Cluster(address, settings, probe, connection).run()
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes
        connection.send(("lost", f"{type(error).__name__}: {error_reason(error)}"))
    os._exit(0)  # Ray's own end may wait for a cluster that is gone


def receive_result(connection: Connection) -> Any:
    """The result that `_send_result` has sent."""
    result = connection.recv()
    if not isinstance(result, PartialSums):
        return result
    arrays = {}
    for key, shape in connection.recv():
        value = np.empty(shape, np.int64)
        if value.size:
            connection.recv_bytes_into(value.reshape(-1).view(np.uint8))
        arrays[key] = value
    return replace(result, arrays=arrays)


def _send_result(connection: Connection, result: Any) -> None:
    """Send a result. Sums are sent as bare bytes, which saves a copy."""
    if not isinstance(result, PartialSums):
        connection.send(result)
        return
    connection.send(replace(result, arrays={}))
    connection.send([(key, value.shape) for key, value in result.arrays.items()])
    for value in result.arrays.values():
        if value.size:
            connection.send_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


class _Cluster:
    """A connection to a Ray cluster. Raises `FedpruneError` if the cluster can't be used, and any exception of Ray if
    it can't be reached."""

    def __init__(self, address: str, settings: WorkerSpec, probe: str, connection: Connection) -> None:
        import ray

        self._ray: Any = ray
        self._connection = connection
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env())
        self._probe(settings, probe)
        # In a list it isn't read before every task.
        self._settings = [ray.put(settings)]
        self._token = probe
        as_remote = self._ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")
        self._remote_task = as_remote(_do_task)
        self._tasks: dict[Any, int] = {}
        self._alive_at = self._updated_at = time.monotonic()
        self._size = -1
        self._update_size(time.monotonic())

    def run(self) -> None:
        """Pass on tasks and results."""
        while True:
            while self._connection.poll(0 if self._tasks else 0.2):
                number, task, arguments = self._connection.recv()
                self._tasks[self._remote_task.remote(self._settings, self._token, task, arguments)] = number
            if self._tasks:
                open_refs = list(self._tasks)
                # A few at a time, so that new tasks are passed on between results.
                count = min(len(open_refs), 8)
                finished_refs, _ = self._ray.wait(open_refs, num_returns=count, timeout=_POLL_INTERVAL_S)
                for ref in finished_refs:
                    self._send_answer(ref, self._tasks.pop(ref))
            now = time.monotonic()
            if now - self._updated_at >= _SIZE_INTERVAL_S:
                self._update_size(now)

    def _send_answer(self, ref: Any, number: int) -> None:
        try:
            result = self._ray.get(ref)
        except Exception as error:  # noqa: BLE001 - whatever a task or its machine died of
            self._connection.send(("failed", number))
            self._connection.send(f"{type(error).__name__}: {str(error)[-1000:]}")
            return
        self._connection.send(("done", number))
        _send_result(self._connection, result)

    def _update_size(self, now: float) -> None:
        """Report the cluster's size if it has changed. Raises `FedpruneError` if it has had no processors for long."""
        self._updated_at = now
        size = int(self._ray.cluster_resources().get("CPU", 0))
        if size:
            self._alive_at = now
        # A cluster that restarts its machines has none for a moment.
        if now - self._alive_at > _EMPTY_TIMEOUT_S:
            raise FedpruneError("the cluster has no processors any more")
        if size != self._size:
            self._size = size
            self._connection.send(("size", size))

    def _probe(self, settings: WorkerSpec, probe: str) -> None:
        """Check that every machine of the cluster can help. Raises `FedpruneError` if one can't, or it has none."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [n for n in self._ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0)]
        if not nodes:
            raise FedpruneError("no machine of the cluster has processors for tasks")
        addresses = {}
        for node in nodes:
            # Not soft: a probe that ran on another machine would say nothing about this one.
            this_machine = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probe_task = self._ray.remote(num_cpus=0, max_retries=1, scheduling_strategy=this_machine)(_probe_machine)
            addresses[probe_task.remote(settings.open_store, probe)] = node["NodeManagerAddress"]
        answered_refs, _ = self._ray.wait(list(addresses), num_returns=len(addresses), timeout=_PROBE_TIMEOUT_S)
        answered = 0
        for ref, address in addresses.items():
            if ref not in answered_refs:
                raise FedpruneError(f"{address} has not answered in {_PROBE_TIMEOUT_S:g} s")
            try:
                version, fault = self._ray.get(ref)
            except Exception:  # noqa: BLE001, S112  # nosec B112  # it has died, and Ray notices that late
                continue
            answered += 1
            if fault or version != __version__:
                raise FedpruneError(f"{address}: {fault or f'fedprune {version} there, {__version__} here'}")
        if not answered:
            raise FedpruneError("no machine of the cluster could be asked")


def _probe_machine(open_store: Callable[[], BlobStore], probe: str) -> tuple[str, str]:
    """A machine's version of fedprune, and the reason if it can't read or store the server's blobs."""
    try:
        store = open_store()
        store.read(probe)
        store.delete(store.put(secrets.token_bytes(32)).sha256)
    except FedpruneError as error:
        return __version__, str(error)
    return __version__, ""


def _do_task(settings: list[Any], token: str, task: Task, arguments: tuple[Any, ...]) -> Any:
    """Do a task, with the last task's worker if that was for the same server."""
    global _worker
    if _worker is None or _worker[0] != token:
        import ray

        spec: WorkerSpec = ray.get(settings[0])
        _worker = token, spec.worker()
    return task(_worker[1], *arguments)
