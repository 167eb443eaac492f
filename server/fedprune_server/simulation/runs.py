"""Many runs, each in a process of its own: on this machine or on a Ray cluster.

A run has a name and settings, and writes its results into its own folder. A finished run is not repeated; a failed or
killed one doesn't affect the others. Processes exchange nothing but files, so their number and place don't matter.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, MissingExtraError, StorageError, shown
from fedprune.core.text import some
from fedprune.wire.topics import check_name
from fedprune_server.executor.ray_driver import runtime_env
from fedprune_server.process.pools import ProcessPerTask, R, TaskPool

DONE, FAILED, PROGRESS = "done.json", "failed.txt", "progress.json"
"""Files of a run's folder."""

_LOCK = ".lock"
_POLL_S = 0.2
_REPORT_S = 0.5


@dataclass(frozen=True)
class RunSpec:
    """One run. Raises `ConfigError` if the name is not valid for a folder."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name, "name of a run", error=ConfigError)


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


Progress = Callable[[float, str], None]
"""Takes a run's finished share and a note for the display."""

RunFunction = Callable[[RunSpec, Path, Progress], None]
"""Does a run in a folder; a module-level function that other processes import."""

Watch = Callable[[Sequence[RunStatus]], None]


def carry_out(
    work: RunFunction,
    runs: Sequence[RunSpec],
    out: Path,
    *,
    workers: int = 1,
    ray: bool = False,
    watch: Watch | None = None,
) -> list[RunEnd]:
    """Do runs, each in a process of its own.

    Args:
        out: Folder of the runs' folders. On a cluster all machines must share it.
        workers: Number of processes; on an existing Ray cluster its cores decide.
        watch: Called periodically with the status of all runs.

    Returns:
        How they ended, in the order of `runs`.

    Raises:
        ConfigError: Two runs have the same name.
        MissingExtraError: Ray is asked for and not installed.
        StorageError: A folder holds another run, another process uses `out`, or the disk fails.
    """
    names = [r.name for r in runs]
    if len(set(names)) < len(names):
        raise ConfigError("runs", expected="a name for each", got=shown(next(n for n in names if names.count(n) > 1)))
    with storage_errors(f"can't make {out}"):
        out.mkdir(parents=True, exist_ok=True)
    hint = "Wait for its end and give the command again, or give another folder."
    with locked(out / _LOCK, f"another command does runs in {out}", hint):
        return _carried_out(work, runs, out, workers, ray, watch)


def _carried_out(
    work: RunFunction, runs: Sequence[RunSpec], out: Path, workers: int, ray: bool, watch: Watch | None
) -> list[RunEnd]:
    open_runs = [r for r in runs if not _is_finished(r, out / r.name)]
    for run in open_runs:
        with storage_errors(f"can't write {out / run.name}"):
            (out / run.name).mkdir(parents=True, exist_ok=True)
            (out / run.name / FAILED).unlink(missing_ok=True)
            (out / run.name / PROGRESS).unlink(missing_ok=True)
    pool: TaskPool[RunFunction] = RayTasks(workers, work) if ray and open_runs else ProcessPerTask(workers, work)
    with closing(pool):
        under_way = {run.name: pool.submit(_do, run, out.resolve()) for run in open_runs}
        while under_way:
            wait(under_way.values(), _POLL_S)
            for name in [name for name, future in under_way.items() if future.done()]:
                _note_death(out / name, under_way.pop(name).exception())
            if watch is not None:
                watch([_status(r, out, under_way.get(r.name)) for r in runs])
    return [_ended(r, out) for r in runs]


def _note_death(folder: Path, error: BaseException | None) -> None:
    """Note why a process ended, if it couldn't do so itself."""
    if error is not None and not (folder / DONE).exists() and not (folder / FAILED).exists():
        write_whole(folder / FAILED, (str(error).strip() or type(error).__name__).encode())


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


def _do(work: RunFunction, run: RunSpec, out: Path) -> None:
    """Do one run in a process of its own; write its result, or the reason of its failure."""
    folder = out / run.name
    last = time.monotonic()

    def report(share: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            write_whole(folder / PROGRESS, json.dumps({"share": share, "note": note}).encode())

    try:
        work(run, folder, report)
        body = {"settings": dict(run.settings)}
        write_whole(folder / DONE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not end other runs
        text = str(error) if isinstance(error, FedpruneError) else traceback.format_exc()
        write_whole(folder / FAILED, f"{type(error).__name__}: {text}\n".encode())


def _is_finished(run: RunSpec, folder: Path) -> bool:
    """Whether a run was done. Raises `StorageError` if it was one with other settings."""
    path = folder / DONE
    try:
        stored = json.loads(path.read_bytes())["settings"]
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read ({type(error).__name__}: {error})", hint="Delete it.") from error
    given = json.loads(json.dumps(dict(run.settings)))
    if stored != given:
        raise StorageError(
            f"{folder} holds a run with other settings",
            got=differences(stored, given),
            hint=f"Take another folder or another name, or delete {folder} to run it again.",
        )
    return True


def _ended(run: RunSpec, out: Path) -> RunEnd:
    if _is_finished(run, out / run.name):
        return RunEnd(run.name)
    failed = out / run.name / FAILED
    return RunEnd(run.name, failed.read_text().strip() if failed.exists() else "it was not done")


def _status(run: RunSpec, out: Path, task: Future[None] | None) -> RunStatus:
    folder = out / run.name
    if (folder / DONE).exists():
        return RunStatus(run.name, "done", 1.0)
    if (folder / FAILED).exists():
        return RunStatus(run.name, "failed", note=folder.joinpath(FAILED).read_text().partition("\n")[0][:80])
    try:
        body = json.loads((folder / PROGRESS).read_bytes())
        return RunStatus(run.name, "running", float(body["share"]), str(body["note"]))
    except (OSError, ValueError, KeyError, TypeError):
        return RunStatus(run.name, "running" if task is not None and task.running() else "waiting")


_MOST = 5
"""Settings that a message names; with more of them another one is meant anyway."""

_NOTHING = object()


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], ignored: Sequence[str] = ()) -> str:
    """The settings that differ, as `job.recipe.lr (stored 0.05, given 0.1)`; empty where none does."""
    old, new = ({k: v for k, v in body.items() if k not in ignored} for body in (stored, given))
    found = [f"{name} (stored {_word(a)}, given {_word(b)})" for name, a, b in _pairs("", old, new)]
    return some(found, most=_MOST)


def _pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every place at which two values differ, as deep as both are tables."""
    old, new = _table(old), _table(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (*old, *(k for k in new if k not in old)):
            yield from _pairs(f"{name}.{key}" if name else key, old.get(key, _NOTHING), new.get(key, _NOTHING))
    elif old != new:
        yield name, old, new


def _table(value: Any) -> Any:
    """A list of tables that have names, by those."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        return {str(v["name"]): v for v in value}
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    return "nothing" if value is _NOTHING else shown(value)
