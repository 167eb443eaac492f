"""Many runs, each in a process of its own: on this machine or on a Ray cluster.

A run has a name and settings, and writes its results into its own folder. If a run is started again, its function
decides whether to resume. A failed or killed one doesn't affect the others. Processes exchange nothing but files, so
their number and place don't matter.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_lock, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, MissingExtraError, value_text
from fedprune.wire.topics import check_topic_name
from fedprune_server.executor.ray_driver import runtime_env
from fedprune_server.process.pools import ProcessPerTask, R, TaskPool

# Files of a run's folder: why it failed, and how far it is.
FAILURE_FILE, PROGRESS_FILE = "failed.txt", "progress.json"

_LOCK_FILE = ".lock"
_POLL_INTERVAL_S = 0.2
_REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True)
class RunSpec:
    """One run. Raises `ConfigError` if the name is not valid for a folder."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_topic_name(self.name, "name of a run", error=ConfigError)


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: the reason of its failure, or an empty text."""

    name: str
    error: str = ""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        state: `waiting`, `running`, `done` or `failed`.
        share: Finished share, from 0 to 1.
    """

    name: str
    state: str
    share: float = 0.0
    note: str = ""


# Takes a run's finished share and a note for the display.
Progress = Callable[[float, str], None]

# Does a run in a folder; a module-level function that other processes import.
RunFunction = Callable[[RunSpec, Path, Progress], None]

Watch = Callable[[Sequence[RunStatus]], None]


def do_runs(
    work: RunFunction,
    runs: Sequence[RunSpec],
    out: Path,
    *,
    workers: int = 1,
    ray: bool = False,
    watch: Watch | None = None,
) -> list[RunEnd]:
    """Do runs, each in a process of its own.

    Returns how they ended, in the order of `runs`.

    Args:
        out: Folder of the runs' folders. On a cluster all machines must share it.
        workers: Number of processes; on an existing Ray cluster its cores decide.
        watch: Called periodically with the status of all runs.

    Raises:
        ConfigError: Two runs have the same name.
        MissingExtraError: Ray is asked for and not installed.
        StorageError: Another process uses `out`, or the disk fails.
    """
    names = [r.name for r in runs]
    if len(set(names)) < len(names):
        repeated = next(n for n in names if names.count(n) > 1)
        raise ConfigError("runs", expected="a name for each", got=value_text(repeated))
    with storage_errors(f"can't make {out}"):
        out.mkdir(parents=True, exist_ok=True)
    hint = "Wait for its end and give the command again, or give another folder."
    with file_lock(out / _LOCK_FILE, f"another command does runs in {out}", hint):
        for run in runs:
            with storage_errors(f"can't write {out / run.name}"):
                (out / run.name).mkdir(parents=True, exist_ok=True)
                # A sweep that is given again tries what failed, and must not report the old failure.
                (out / run.name / FAILURE_FILE).unlink(missing_ok=True)
                (out / run.name / PROGRESS_FILE).unlink(missing_ok=True)
        pool: TaskPool[RunFunction] = RayTasks(workers, work) if ray else ProcessPerTask(workers, work)
        with closing(pool):
            tasks = {run.name: pool.submit(_do_run, run, out.resolve()) for run in runs}
            unfinished = set(tasks.values())
            while unfinished:
                unfinished = wait(unfinished, _POLL_INTERVAL_S).not_done
                if watch is not None:
                    watch([_run_status(out / name, task) for name, task in tasks.items()])
        return [RunEnd(name, _failure_reason(out / name, task)) for name, task in tasks.items()]


def _failure_reason(folder: Path, task: Future[None]) -> str:
    """The reason of a run's failure, or an empty text. If the run's process couldn't write it, it is written here."""
    path, error = folder / FAILURE_FILE, task.exception()
    # A process that was killed, for want of memory perhaps, has written nothing.
    if error is not None and not path.exists():
        write_atomically(path, (str(error).strip() or type(error).__name__).encode())
    return path.read_text().strip() if path.exists() else ""


class RayTasks(TaskPool[RunFunction]):
    """Tasks of a Ray cluster, which is started on this machine if none runs."""

    def __init__(self, size: int, work: RunFunction) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("Ray is not installed", extra="scale") from error
        self._ray, self._size, self._work = ray, size, work
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address="auto", log_to_driver=False, runtime_env=runtime_env())
            except ConnectionError:
                ray.init(num_cpus=size, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env())
        self._tasks: list[Any] = []

    @property
    def size(self) -> int:
        return self._size

    def submit(self, task: Callable[..., R], *arguments: Any) -> Future[R]:
        self._tasks.append(self._ray.remote(num_cpus=1, max_retries=0)(task).remote(self._work, *arguments))
        future: Future[R] = self._tasks[-1].future()
        return future

    def close(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        if self._started:
            self._ray.shutdown()


def _do_run(work: RunFunction, run: RunSpec, out: Path) -> None:
    """Do one run in a process of its own; write the reason of its failure."""
    folder = out / run.name
    last = time.monotonic()

    def report(share: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_INTERVAL_S:
            last = time.monotonic()
            write_atomically(folder / PROGRESS_FILE, json.dumps({"share": share, "note": note}).encode())

    try:
        work(run, folder, report)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not end other runs
        text = str(error) if isinstance(error, FedpruneError) else traceback.format_exc()
        write_atomically(folder / FAILURE_FILE, f"{type(error).__name__}: {text}\n".encode())


def _run_status(folder: Path, task: Future[None]) -> RunStatus:
    if task.done():
        error = _failure_reason(folder, task)
        return RunStatus(folder.name, "failed") if error else RunStatus(folder.name, "done", 1.0)
    try:
        body = json.loads((folder / PROGRESS_FILE).read_bytes())
        return RunStatus(folder.name, "running", float(body["share"]), str(body["note"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RunStatus(folder.name, "running" if task.running() else "waiting")
