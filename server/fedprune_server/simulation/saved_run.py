"""Saves a simulation's state in a folder, so that the run resumes after a kill.

One JSON file holds the current state; finished rounds are appended to a second file, so the cost of saving doesn't grow
with the run. The settings beside them prevent resuming a run with other settings, model or data.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.coordination import events as on
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_lock, open_file, read_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune_export.bundles.inference import write_model
from fedprune_export.pruning.model import Model
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.state import SimulationState, TrainingEnd, WindowEnd

FORMAT = "fedprune.simulation/12"
CONFIG_FILE = "config.json"
STATE_FILE = "simulation.json"
ROUNDS_FILE = "rounds.jsonl"

_LOCK_FILE = ".lock"
_ITEM_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        TrainingEnd, WindowEnd, on.DeviceBorn, on.DeviceDied, on.Scored, on.Extracted, on.UpdateAnnounced,
        on.UpdateStored, on.UpdateRejected, on.OfferRefused, on.Folded, on.Closed, on.Evaluated, on.Ticked,
    )
}  # fmt: skip

# Attributes that are saved as they are.
_PLAIN_ATTRIBUTES = (
    "clock", "sequence", "sessions", "leaves", "held", "tables", "sizes", "bounds", "boards", "free", "cached",
    "refusal", "macs",
)  # fmt: skip


_CHECKPOINTS = "checkpoints"  # the folder of saved global models
_SCRATCH = "scratch"  # the folder of files for the processes that train


@dataclass(frozen=True)
class SavePace:
    """How often a state is saved.

    Attributes:
        interval_s: Seconds between two saves within a round.
        min_wait_ratio: A save waits for at least this many times the duration of the last one (20: saving takes at
            most 1/20 of the time), except at the ends of short rounds.
        expensive_s: Duration of a save above which the ends of rounds are skipped, too.
    """

    interval_s: float = 5.0
    min_wait_ratio: float = 20.0
    expensive_s: float = 0.25


SAVE_PACE = SavePace()


class SavedRun:
    """Saves and loads a simulation's state and the coordinator's, and locks their folder.

    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, experiment: Experiment, pace: SavePace) -> None:
        self._folder, self._experiment, self._pace = folder, experiment, pace
        self._configured = False
        self._saved_at, self._save_s = time.monotonic(), 0.0
        self._stamp: tuple[int, ...] | None = None
        # Finished rounds in their file, and its bytes.
        self._logged_position = (0, 0)

    def load(self) -> tuple[SimulationState, State] | None:
        """The saved state and the coordinator's, or None. Raises `StorageError` if it is damaged, of another format, of
        a run with other settings, or further than the job's rounds."""
        if self._folder is None:
            return None
        self._stamp = _save_identity(self._folder)
        path, config, hint = self._folder / STATE_FILE, self._folder / CONFIG_FILE, _restart_hint(self._folder)
        if not path.exists():
            return None
        body, settings = _read_json(path, "simulation"), _read_json(config, "simulation's settings")
        try:
            if body["format"] != FORMAT:
                raise StorageError(f"{path} is of another version", expected=FORMAT, hint=hint)
            if differences := self._experiment.differences(settings):
                what = f"{config} has other settings, another model or other data"
                raise StorageError(what, got=differences, hint=hint)
            count, size = map(int, body["rounds"])
            history, notes = _finished_rounds(self._folder / ROUNDS_FILE, count, size)
            state = _simulation_state(body, notes)
            coordinator = State.from_json(body["coordinator"])
            coordinator.history = history
            # A job with fewer rounds than are done, or under way, would have no end.
            current_round = len(history) + (coordinator.phase is not Phase.FINISHED)
            if (rounds := self._experiment.job.rounds) < current_round:
                what = f"{path} belongs to a simulation that has come to round {current_round}"
                raise StorageError(what, got=f"job.rounds = {rounds}", hint=hint)
        except StorageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StorageError(f"{path} is damaged ({type(error).__name__}: {error})", hint=hint) from error
        self._logged_position = count, size
        return state, coordinator

    @contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """A folder that is there as long as a run: in the run's own, where the next start removes what a kill left."""
        if self._folder is None:
            with TemporaryDirectory(prefix="fedprune-simulation-") as folder:
                yield Path(folder)
            return
        path = self._folder / _SCRATCH
        shutil.rmtree(path, ignore_errors=True)
        try:
            with storage_errors(f"can't write {path}"):
                path.mkdir(parents=True, exist_ok=True)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the folder's lock. Yields whether any process has saved there since `load`. Raises `StorageError` if
        another process holds it, or the disk fails."""
        if self._folder is None:
            yield False
            return
        with storage_errors(f"can't make {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        hint = "Wait for its end and give the command again, or give another folder."
        with file_lock(self._folder / _LOCK_FILE, f"another simulation runs in {self._folder}", hint):
            changed = _save_identity(self._folder) != self._stamp
            try:
                yield changed
            finally:
                self._stamp = ()  # what is in memory may be ahead of what was saved

    def is_due(self, *, round_ended: bool) -> bool:
        """Whether it is time to save and to delete superseded blobs."""
        if self._folder is None:
            return round_ended
        # The longer saving takes, the rarer it is: a large fleet's state must not slow down the run.
        min_wait_s = self._pace.min_wait_ratio * self._save_s
        if not round_ended:
            min_wait_s = max(self._pace.interval_s, min_wait_s)
        elif self._save_s <= self._pace.expensive_s:
            return True
        return time.monotonic() - self._saved_at >= min_wait_s

    def save(self, run: SimulationState, coordinator: State) -> None:
        """Save the state together with the coordinator's. Raises `StorageFullError` if the disk is full, and
        `StorageError` if it fails; the previous state is untouched."""
        if self._folder is None:
            return
        started_at = time.monotonic()
        if not self._configured:
            config = json.dumps(self._experiment.settings(), indent=1) + "\n"
            write_atomically(self._folder / CONFIG_FILE, config.encode())
            self._configured = True
        # Rounds first: the state names how many of their lines count, so that a kill in between leaves lines that the
        # next save cuts off.
        logged = self._append_rounds(self._folder / ROUNDS_FILE, run, coordinator.history)
        body = {
            "format": FORMAT,
            "coordinator": replace(coordinator, history=[]).to_json(),
            "rounds": logged,
            **{name: getattr(run, name) for name in _PLAIN_ATTRIBUTES},
            "online": sorted(run.online),
            "unsent": {k: vars(v) for k, v in run.unsent.items()},
            "bytes": [run.down, run.up],
            "now": vars(run.now),
            "queue": [[at, n, type(item).__name__, vars(item)] for n, (at, item) in run.queue.items()],
        }
        # Only metrics in the queue are no JSON type: those that have yet to be read.
        write_atomically(self._folder / STATE_FILE, json.dumps(body, default=dict).encode())
        self._logged_position = logged
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - started_at

    def _append_rounds(self, path: Path, run: SimulationState, history: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Append the rounds that finished since the last save."""
        logged_rounds, logged_bytes = self._logged_position
        rows = [json.dumps([row, vars(run.rounds[row["round"]])]) + "\n" for row in history[logged_rounds:]]
        if not rows:
            return self._logged_position
        data = "".join(rows).encode()
        with storage_errors(f"can't write {path}"), path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(logged_bytes)  # without rounds whose state was not saved before the run was killed
            file.seek(logged_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(history), logged_bytes + len(data)

    def write_checkpoint(self, model: Model, number: int, weights: bytes) -> None:
        """Write a global model as `checkpoints/round-000010/model.onnx` and `weights.safetensors`. Raises
        `StorageFullError` if there is no room, and `StorageError` if the disk fails."""
        if self._folder is not None:
            write_model(self._folder / _CHECKPOINTS / f"round-{number:06d}", model, weights)


def _save_identity(folder: Path) -> tuple[int, ...] | None:
    """Identity of the last save in a folder; None before the first."""
    try:
        status = (folder / STATE_FILE).stat()
    except OSError:
        return None
    # The inode changes with every atomic replacement, even within one tick of the clock.
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_json(path: Path, content: str) -> Any:
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError) as error:
        raise StorageError(f"can't read the {content} in {path} ({error})", hint=_restart_hint(path.parent)) from error


def _simulation_state(body: dict[str, Any], notes: dict[int, RoundNotes]) -> SimulationState:
    down, up = map(int, body["bytes"])
    state = SimulationState(
        **{name: body[name] for name in _PLAIN_ATTRIBUTES},
        online=set(body["online"]),
        unsent={k: on.UpdateAnnounced(**v) for k, v in body["unsent"].items()},
        down=down,
        up=up,
        now=RoundNotes(**body["now"]),
        rounds=notes,
    )
    for virtual_time, number, kind, fields in body["queue"]:
        state.push_numbered(float(virtual_time), int(number), _ITEM_TYPES[kind](**fields))
    return state


def _restart_hint(folder: Path) -> str:
    return f"Name another folder, or delete {folder} and give the command again: it starts again."


def _finished_rounds(path: Path, count: int, length: int) -> tuple[list[dict[str, Any]], dict[int, RoundNotes]]:
    """The coordinator's history and the simulation's notes of finished rounds."""
    if not count:
        return [], {}
    try:
        with open_file(path) as file:
            lines = file.read(length).decode().splitlines()
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=_restart_hint(path.parent)) from error
    if len(lines) != count:
        hint = _restart_hint(path.parent)
        raise StorageError(f"{path} is damaged", expected=f"{count} rounds", got=len(lines), hint=hint)
    rows = [json.loads(line) for line in lines]
    return [row for row, _ in rows], {int(row["round"]): RoundNotes(**notes) for row, notes in rows}
