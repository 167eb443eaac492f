"""A worker pool on a Ray cluster: hands tasks to a driver process, and connects again when the cluster was lost.

Ray runs in a child process, because a driver may end its process when it loses its cluster, and because it takes over
signals and the log. If that child or the cluster is lost, only the futures of open tasks fail: the worker does them
itself, and a new child tries to reach the cluster once a minute.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from fedprune.core.errors import ExitCode, FedpruneError, MissingExtraError, error_reason
from fedprune_server.config.cluster_url import check_cluster_url, needs_ray_client, ray_address, ray_endpoint
from fedprune_server.executor.pool_tasks import Task, WorkerSpec
from fedprune_server.executor.ray_driver import receive_result, run_driver
from fedprune_server.executor.worker import Worker
from fedprune_server.process.pools import TaskPool

log = logging.getLogger("fedprune.server")

_CONNECT_TIMEOUT_S = 10.0
_START_TIMEOUT_S, _POLL_INTERVAL_S = 120.0, 0.2
_RETRY_INTERVAL_S = 60.0


class ClusterError(FedpruneError):
    """A cluster of helpers can't be reached, is lost, or can't do what it should."""

    exit_code = ExitCode.CLUSTER


def _unusable_cluster(url: str, why: str) -> ClusterError:
    return ClusterError(
        f"the Ray cluster at {url} can't be used",
        got=why,
        hint="Start it with `ray start`, check address and port, and see that all its machines see the state folder's "
        "blobs, or have AWS_... of the bucket in their environment, and have this version of fedprune; --workers-url "
        "processes does without.",
    )


class RayPool(TaskPool[Worker]):
    """Carries out tasks on a cluster (`fedprune_server.config.cluster_url`). Every machine of the cluster must see the
    folder of the worker's blob store, or reach its bucket.

    Raises:
        ClusterError: The cluster can't be reached, has no processors, or a machine of it doesn't see the blobs.
        MissingExtraError: Ray is not installed.
        ConfigError: The URL is invalid.
    """

    adds_updates = True
    patience_s = 900.0

    def __init__(self, url: str, worker: Worker, *, retry_s: float = _RETRY_INTERVAL_S) -> None:
        check_cluster_url(url)
        # Looked for, not imported: Ray takes over signals and the log of the process that imports it.
        if importlib.util.find_spec("ray") is None:
            raise MissingExtraError("Ray is not installed", extra="scale")
        if needs_ray_client(url) and importlib.util.find_spec("grpc") is None:
            raise MissingExtraError("Ray's client is not installed", extra="scale")
        self._url = url
        self._store = worker.store
        self._settings = WorkerSpec.remote(worker)
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._closed = False
        self._reconnecting: threading.Thread | None = None
        self._tried_at = time.monotonic()
        self._driver: DriverProcess | None = self._connect()
        threading.Thread(target=self._driver.listen, name="fedprune-ray", daemon=True).start()
        log.info("a cluster at %s helps: %d processors", url, self._driver.size)

    @property
    def size(self) -> int:
        """Processors of the cluster; 1 while it is lost."""
        driver = self._driver
        return 1 if driver is None else max(1, driver.size)

    def submit(self, task: Task, *arguments: Any) -> Future[Any]:
        with self._lock:
            driver = self._driver
            if driver is not None and driver.is_lost:
                self._driver = driver = None
            is_idle = self._reconnecting is None or not self._reconnecting.is_alive()
            if driver is None and not self._closed and is_idle and time.monotonic() - self._tried_at >= self._retry_s:
                self._reconnecting = threading.Thread(target=self._reconnect, name="fedprune-cluster", daemon=True)
                self._reconnecting.start()
        if driver is None:
            future: Future[Any] = Future()
            future.set_exception(ClusterError("the cluster is lost"))
            return future
        return driver.submit(task, *arguments)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    def _reconnect(self) -> None:
        try:
            driver = self._connect()
        except FedpruneError as error:
            log.debug("%s", error)
            self._tried_at = time.monotonic()
            return
        with self._lock:
            is_closed = self._closed
            self._driver = None if is_closed else driver
        if is_closed:
            driver.close()
            return
        log.info("the cluster at %s is back: %d processors", self._url, driver.size)
        driver.listen()  # here: the child ends with the thread that has started it

    def _connect(self) -> DriverProcess:
        address = ray_endpoint(self._url)
        if address is not None:  # Ray itself tries for minutes
            try:
                socket.create_connection(address, _CONNECT_TIMEOUT_S).close()
            except (OSError, OverflowError) as error:
                raise _unusable_cluster(self._url, error_reason(error)) from error
        # A machine that can read this blob sees this folder or bucket, not an empty one of the same name.
        probe = self._store.put(secrets.token_bytes(32)).sha256
        try:
            return DriverProcess(self._url, self._settings, probe, self._on_driver_lost, lambda: self._closed)
        finally:
            self._store.delete(probe)

    def _on_driver_lost(self) -> None:
        self._tried_at = time.monotonic()
        if not self._closed:
            log.warning("the cluster at %s is lost: the server does its work until it is back", self._url)


class DriverProcess:
    """The process that is the cluster's driver. The blob `probe` must be visible to all machines of the cluster. `size`
    is the number of the cluster's processors; `is_lost` says that the child, or its cluster, is gone."""

    def __init__(
        self, url: str, settings: WorkerSpec, probe: str, on_lost: Callable[[], None], is_closed: Callable[[], bool]
    ) -> None:
        self._on_lost = on_lost
        self._is_closed = is_closed
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(
            target=run_driver, args=(os.getpid(), ray_address(url), settings, probe, child_end), name="fedprune-ray"
        )
        self._process.start()
        child_end.close()
        self.size, self.is_lost = 0, False
        self._number = 0
        self._futures: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._unsent: queue.SimpleQueue[tuple[int, Task, tuple[Any, ...]] | None] = queue.SimpleQueue()
        try:
            self.size = self._await_size(url)
        except BaseException:
            self.close()
            raise
        # A pipe is full soon while a cluster doesn't answer, and the server's loop must not wait for it.
        threading.Thread(target=self._send_tasks, name="fedprune-ray-tasks", daemon=True).start()

    def _await_size(self, url: str) -> int:
        """Wait for the child to reach the cluster and report its processors."""
        # The child sends pairs of a kind and a value (`run_driver`).
        kind, value = "lost", f"no answer in {_START_TIMEOUT_S:g} s"
        until = time.monotonic() + _START_TIMEOUT_S
        with suppress(EOFError, OSError):
            # Polled: a server that ends meanwhile must not wait for the cluster.
            while not self._is_closed() and time.monotonic() < until:
                if self._connection.poll(_POLL_INTERVAL_S):
                    kind, value = self._connection.recv()
                    break
        if kind == "size":
            return int(value)
        raise _unusable_cluster(url, value)

    def submit(self, task: Task, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self.is_lost:
                future.set_exception(ClusterError("the cluster is lost"))
                return future
            self._number += 1
            self._futures[self._number] = future
            self._unsent.put((self._number, task, arguments))
        return future

    def _send_tasks(self) -> None:
        while (task := self._unsent.get()) is not None:
            try:
                self._connection.send(task)
            except OSError:  # noqa: PERF203 - the child is gone, which `listen` notices
                return
            except Exception as error:  # noqa: BLE001 - pickling may fail in any way, and does before a byte is sent
                with self._lock:
                    future = self._futures.pop(task[0], None)
                if future is not None:  # else the cluster was lost meanwhile
                    future.set_exception(ClusterError("a task can't be handed to the cluster", got=error_reason(error)))

    def listen(self) -> None:
        """Receive results until the child ends."""
        try:
            while True:
                kind, value = self._connection.recv()
                if kind == "lost":
                    log.debug("the cluster: %s", value)
                    break
                if kind == "size":
                    self.size = int(value)
                elif kind == "done":
                    self._futures.pop(value).set_result(receive_result(self._connection))
                else:
                    error = ClusterError("a helper failed", got=self._connection.recv())
                    self._futures.pop(value).set_exception(error)
        except (EOFError, OSError):
            pass
        except Exception:  # an answer that can't be read; the ones behind it can't be told apart either
            log.warning("what a cluster answers can't be read", exc_info=True)
        with self._lock:
            self.is_lost = True
            unanswered, self._futures = list(self._futures.values()), {}
        self._unsent.put(None)
        self._on_lost()
        for future in unanswered:
            future.set_exception(ClusterError("the cluster is lost"))
        self.close()

    def close(self) -> None:
        self._process.terminate()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
