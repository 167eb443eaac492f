"""Pools that run tasks in other processes: each task is a function of a worker and further arguments.

A worker, such as a loaded model, is made once in each process. The error of a task is in its future, and another
process can repeat the task.
"""

from __future__ import annotations

import ast
import linecache
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import SpawnProcess
from pathlib import Path
from traceback import walk_stack
from typing import Any, Generic, TypeVar

from fedprune.core.errors import ConfigError
from fedprune_server.process.child_process import ChildDiedError
from fedprune_server.process.child_side import end_with_parent

W = TypeVar("W")
R = TypeVar("R")

log = logging.getLogger("fedprune.server")

# Processes are spawned: a fork would copy whatever locks other threads hold at that moment.
_SPAWN_CONTEXT = multiprocessing.get_context("spawn")


def _check_main_guard() -> None:
    """Raise `ConfigError` where new processes would run the user's script again, and it this call."""
    main = sys.modules["__main__"]
    frames = [f for f, _ in walk_stack(sys._getframe()) if f.f_globals is vars(main) and f.f_code.co_name == "<module>"]
    # Spawned processes import the main module, except a notebook's and `__main__.py`.
    if not frames or Path(getattr(main, "__file__", "__main__.py")).name == "__main__.py":
        return
    line, source = frames[0].f_lineno, "".join(linecache.getlines(frames[0].f_code.co_filename))
    blocks = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If)]
    conditions = [ast.unparse(block.test) for block in blocks if block.lineno <= line <= (block.end_lineno or 0)]
    if source and not re.search("__name__|process", " ".join(conditions)):
        what = f"{main.__file__}, line {line}, starts processes, each of which imports the script"
        hint = "Indent what isn't a definition under this line, or give workers=1."
        raise ConfigError(what, expected='a block that they skip: if __name__ == "__main__":', hint=hint)


class TaskPool(ABC, Generic[W]):
    """Runs tasks. A result is awaited for `patience_s` at most; None to wait for as long as it takes. With
    `adds_updates` a server has its updates checked and added up by this pool, too."""

    patience_s: float | None = None
    adds_updates = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of tasks that run at a time."""

    @abstractmethod
    def submit(self, task: Callable[..., R], *arguments: Any) -> Future[R]:
        """Run `task(worker, *arguments)` in another process; task and arguments have to be picklable."""

    @abstractmethod
    def close(self) -> None:
        """End the processes, and drop tasks that have not begun."""


class ProcessPool(TaskPool[W]):
    """Processes that stay, each with a worker, which `make` (picklable) makes. With `restarts` killed processes are
    replaced; without, a killed one breaks the pool."""

    def __init__(self, size: int, make: Callable[[], W], *, restarts: bool = False) -> None:
        _check_main_guard()
        self._size, self._make, self._restarts = size, make, restarts
        self._processes = self._start_processes()

    @property
    def size(self) -> int:
        return self._size

    def submit(self, task: Callable[..., R], *arguments: Any) -> Future[R]:
        """Run a task. Raises `BrokenExecutor` if a process was killed and the pool doesn't restart."""
        try:
            return self._processes.submit(_run_task, task, arguments)
        except BrokenExecutor:
            if not self._restarts:
                raise
            log.warning("a helper was killed, maybe since memory ran out; others take its place")
            self._processes.shutdown(wait=False)
            self._processes = self._start_processes()
            return self._processes.submit(_run_task, task, arguments)

    def close(self, *, wait: bool = False) -> None:
        self._processes.shutdown(wait=wait, cancel_futures=True)

    def _start_processes(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._size, _SPAWN_CONTEXT, _initialise_process, (os.getpid(), self._make))


# In a process of a pool: its worker.
# Global, because a task that is sent to a process can't refer to an object that was made there.
_worker: Any = None


def _initialise_process(parent: int, make: Callable[[], Any]) -> None:
    global _worker
    end_with_parent(parent)
    _worker = make()


def _run_task(task: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    return task(_worker, *arguments)


class ProcessPerTask(TaskPool[W]):
    """Gives each task a process of its own, `size` at a time, so that a killed one costs no other task. Results are
    dropped. The tasks' first argument is `worker`."""

    def __init__(self, size: int, worker: W) -> None:
        _check_main_guard()
        self._size, self._worker = size, worker
        # One thread for each process: Linux would end the child of a thread that ends.
        self._threads = ThreadPoolExecutor(size)
        self._lock = threading.Lock()
        self._running: set[SpawnProcess] = set()
        self._closed = False

    @property
    def size(self) -> int:
        return self._size

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[None]:  # type: ignore[override]
        return self._threads.submit(self._carry_out, task, arguments)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.terminate()
        self._threads.shutdown(cancel_futures=True)

    def _carry_out(self, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        process = _SPAWN_CONTEXT.Process(target=_run_alone, args=(os.getpid(), task, (self._worker, *arguments)))
        with self._lock:
            if self._closed:
                return
            process.start()
            self._running.add(process)
        multiprocessing.connection.wait([process.sentinel])
        with self._lock:  # two threads must not ask for exit codes at a time
            process.join()
            self._running.discard(process)
        if process.exitcode:
            raise ChildDiedError(f"its process ended with exit code {process.exitcode}")


def _run_alone(parent: int, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    end_with_parent(parent)
    task(*arguments)
