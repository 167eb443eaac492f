"""Many runs, each in a process of its own: on this machine or on a Ray cluster.

A run has a name and settings, and writes its results into its own folder. A finished run is not repeated; a failed or
killed one doesn't affect the others. Processes exchange nothing but files, so their number and place don't matter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, MissingExtraError, StorageError, shown
from fedprune.core.text import some
from fedprune.wire.topics import check_name
from fedprune_server.process.children import begin_helper

DONE, FAILED, PROGRESS = "done.json", "failed.txt", "progress.json"
"""Files of a run's folder."""

_LOCK = ".lock"
_POLL_S = 0.2
_REPORT_S = 0.5


@dataclass(frozen=True)
class Run:
    """One run.

    Raises:
        ConfigError: The name is not valid for a folder.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check_name(self.name, "name of a run")
        except FedpruneError as error:
            raise ConfigError("name of a run", expected=error.expected, got=shown(self.name)) from error


@dataclass(frozen=True)
class Ended:
    """A run's result.

    Attributes:
        name: The run.
        result: Return value of its work; None if it failed.
        error: Reason of the failure.
        seconds: Duration.
    """

    name: str
    result: dict[str, Any] | None
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Standing:
    """A run's status.

    Attributes:
        name: The run.
        state: `waiting`, `running`, `done` or `failed`.
        share: Finished share, from 0 to 1.
        note: A note for the display.
    """

    name: str
    state: str
    share: float = 0.0
    note: str = ""


Report = Callable[[float, str], None]
"""Takes a run's finished share and a note for the display."""

WorkOf = Callable[[Run, Path, Report], Mapping[str, Any]]
"""Does a run in a folder and returns its result as JSON types; a module-level function that other processes import."""

Watch = Callable[[Sequence[Standing]], None]


def carry_out(
    work: WorkOf, runs: Sequence[Run], out: Path, *, workers: int = 1, ray: bool = False, watch: Watch | None = None
) -> list[Ended]:
    """Do runs, each in a process of its own.

    Args:
        work: What a run does.
        runs: The runs.
        out: Folder of the runs' folders. On a cluster all machines must share it.
        workers: Number of processes; on an existing Ray cluster its cores decide.
        ray: Whether to use Ray.
        watch: Called periodically with the status of all runs.

    Returns:
        The results, in the order of `runs`.

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
    work: WorkOf, runs: Sequence[Run], out: Path, workers: int, ray: bool, watch: Watch | None
) -> list[Ended]:
    waiting = [r for r in runs if _finished(r, out / r.name) is None]
    for run in waiting:
        with storage_errors(f"can't write {out / run.name}"):
            (out / run.name).mkdir(parents=True, exist_ok=True)
            (out / run.name / FAILED).unlink(missing_ok=True)
            (out / run.name / PROGRESS).unlink(missing_ok=True)
    pool: _Processes | _Ray = _Ray(workers) if ray and waiting else _Processes(workers)
    try:
        while waiting or pool.active:
            while waiting and pool.free:
                pool.start(work, waiting.pop(0), out)
            time.sleep(_POLL_S)
            for run, why in pool.ended():
                if why and _finished(run, out / run.name) is None and not (out / run.name / FAILED).exists():
                    write_whole(out / run.name / FAILED, why.encode())
            if watch is not None:
                watch([_standing(r, out, r.name in pool.active) for r in runs])
    finally:
        pool.close()
    return [_ended(r, out) for r in runs]


class _Processes:
    """Runs in processes of this machine."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # A fork would copy whatever locks other threads hold at that moment.
        self._context = multiprocessing.get_context("spawn")
        self.active: dict[str, tuple[Run, Any]] = {}

    @property
    def free(self) -> bool:
        return len(self.active) < self._workers

    def start(self, work: WorkOf, run: Run, out: Path) -> None:
        process = self._context.Process(target=_do_here, args=(os.getpid(), work, run, out), name=run.name)
        process.start()
        self.active[run.name] = (run, process)

    def ended(self) -> list[tuple[Run, str]]:
        """Finished processes, each with the error to report if it left no result."""
        over = [(run, process) for run, process in self.active.values() if not process.is_alive()]
        for run, process in over:
            process.join()
            del self.active[run.name]
        return [(run, f"its process ended with exit code {process.exitcode}") for run, process in over]

    def close(self) -> None:
        for _, process in self.active.values():
            process.terminate()
        for _, process in self.active.values():
            process.join()


class _Ray:
    """Runs on a Ray cluster, which is started on this machine if there is none."""

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise MissingExtraError("Ray is not installed", extra="scale") from error
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            # What can be imported here must be there, too: a work may be a module of the current folder.
            there = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
            try:
                ray.init(address="auto", log_to_driver=False, runtime_env=there)
            except ConnectionError:
                ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, runtime_env=there)
        self._do = ray.remote(num_cpus=1, max_retries=0)(_do)
        self.active: dict[str, tuple[Run, Any]] = {}

    @property
    def free(self) -> bool:
        """Ray queues runs itself."""
        return True

    def start(self, work: WorkOf, run: Run, out: Path) -> None:
        self.active[run.name] = (run, self._do.remote(work, run, out.resolve()))

    def ended(self) -> list[tuple[Run, str]]:
        """Finished tasks, each with the error to report if it left no result."""
        found = []
        for run, task in list(self.active.values()):
            if not self._ray.wait([task], timeout=0)[0]:
                continue
            del self.active[run.name]
            try:
                self._ray.get(task)
                found.append((run, "it left no result"))
            except Exception as error:  # noqa: BLE001 - a worker may die in any way
                found.append((run, str(error).strip() or type(error).__name__))
        return found

    def close(self) -> None:
        for _, task in self.active.values():
            self._ray.cancel(task, force=True)
        if self._mine:
            self._ray.shutdown()


def _do_here(parent: int, work: WorkOf, run: Run, out: Path) -> None:
    begin_helper(parent)
    _do(work, run, out)


def _do(work: WorkOf, run: Run, out: Path) -> None:
    """Do one run in a process of its own; write its result, or the reason of its failure."""
    folder = out / run.name
    began = last = time.monotonic()

    def report(share: float, note: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            write_whole(folder / PROGRESS, json.dumps({"share": share, "note": note}).encode())

    try:
        result = dict(work(run, folder, report))
        body = {"settings": dict(run.settings), "result": result, "seconds": time.monotonic() - began}
        write_whole(folder / DONE, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not end other runs
        text = str(error) if isinstance(error, FedpruneError) else traceback.format_exc()
        write_whole(folder / FAILED, f"{type(error).__name__}: {text}\n".encode())


def _finished(run: Run, folder: Path) -> dict[str, Any] | None:
    path = folder / DONE
    try:
        body = json.loads(path.read_bytes())
        settings, result = body["settings"], dict(body["result"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read ({type(error).__name__}: {error})", hint="Delete it.") from error
    given = json.loads(json.dumps(dict(run.settings)))
    if settings != given:
        raise StorageError(
            f"{folder} holds a run with other settings",
            got=differences(settings, given),
            hint=f"Take another folder or another name, or delete {folder} to run it again.",
        )
    return {"result": result, "seconds": float(body["seconds"])}


def _ended(run: Run, out: Path) -> Ended:
    found = _finished(run, out / run.name)
    if found is not None:
        return Ended(run.name, found["result"], "", found["seconds"])
    failed = out / run.name / FAILED
    return Ended(run.name, None, failed.read_text().strip() if failed.exists() else "it was not done")


def _standing(run: Run, out: Path, active: bool) -> Standing:
    folder = out / run.name
    if (folder / DONE).exists():
        return Standing(run.name, "done", 1.0)
    if (folder / FAILED).exists():
        return Standing(run.name, "failed", note=folder.joinpath(FAILED).read_text().partition("\n")[0][:80])
    try:
        body = json.loads((folder / PROGRESS).read_bytes())
        return Standing(run.name, "running", float(body["share"]), str(body["note"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Standing(run.name, "running" if active else "waiting")


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
