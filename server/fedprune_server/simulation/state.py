"""The state of a simulation apart from the coordinator's: queued events, connections, traffic.

One JSON file holds the current state; finished rounds are appended to a second file, so the cost of saving doesn't grow
with the run. The settings beside them prevent resuming a run with other settings, model or data.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.coordination import events as on
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_lock, storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.text import all_strings
from fedprune_export.bundles.inference import write_model
from fedprune_export.pruning.model import Model
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.simulation.experiment import Experiment

FORMAT = "fedprune.simulation/9"
CONFIG_FILE = "config.json"
STATE_FILE = "simulation.json"
ROUNDS_FILE = "rounds.jsonl"

_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class TrainingEnd:
    """The end of a virtual device's training; the numbers are computed when it is taken from the queue."""

    device: str
    round: int
    attempt: int
    offer: dict[str, Any]


@dataclass(frozen=True)
class WindowEnd:
    """The end of a device's window of time, valid for one connection."""

    device: str
    session: int


Item = on.Event | TrainingEnd | WindowEnd

_ITEM_TYPES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        TrainingEnd, WindowEnd, on.DeviceBorn, on.DeviceDied, on.Scored, on.Extracted, on.UpdateAnnounced,
        on.UpdateStored, on.UpdateRejected, on.OfferRefused, on.Folded, on.Closed, on.Evaluated, on.Ticked,
    )
}  # fmt: skip

_WORK_TYPES = (TrainingEnd, on.UpdateAnnounced, on.UpdateStored)  # items that belong to a device's part in a round

# Attributes that are saved as they are.
_PLAIN_ATTRIBUTES = (
    "clock", "sequence", "sessions", "leaves", "held", "tables", "sizes", "bounds", "boards", "free",
    "refusal", "macs",
)  # fmt: skip


@dataclass
class SimulationState:
    """The state of a run apart from the coordinator's.

    Attributes:
        clock: Virtual seconds since the start.
        sequence: Number of the last queued item; it orders items of the same time.
        queue: Queued items with their times, by number.
        sessions: Number of each device's latest connection.
        leaves: End of each device's window of time.
        held: Digests of the blobs that each device holds.
        tables: Digest of the leaf table of the weights that each device was sent last.
        unsent: Announced updates that the server doesn't have yet, by device.
        sizes: Bytes of the update last requested from each device.
        bounds: Maximum bytes of that update in the offered codec.
        boards: Digest of each board's state between rounds.
        free: Times at which the server's link is free, for sending and for receiving.
        now: Notes of the current round.
        rounds: Notes of finished rounds, by number.
        refusal: Reason of the last refused offer.
    """

    clock: float = 0.0
    sequence: int = 0
    queue: dict[int, tuple[float, Item]] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)
    leaves: dict[str, float] = field(default_factory=dict)
    held: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    unsent: dict[str, on.UpdateAnnounced] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    bounds: dict[str, int] = field(default_factory=dict)
    boards: dict[str, str] = field(default_factory=dict)
    free: list[float] = field(default_factory=lambda: [0.0, 0.0])
    down: int = 0
    up: int = 0
    macs: int = 0
    now: RoundNotes = field(default_factory=RoundNotes)
    rounds: dict[int, RoundNotes] = field(default_factory=dict)
    refusal: str = ""
    _order: list[tuple[float, int]] = field(default_factory=list)
    _work: dict[str, set[int]] = field(default_factory=dict)

    def push(self, virtual_time: float, item: Item) -> None:
        self.sequence += 1
        self.push_numbered(virtual_time, self.sequence, item)

    def push_numbered(self, virtual_time: float, number: int, item: Item) -> None:
        """Queue an item under a given number, such as that of a saved one."""
        self.queue[number] = (virtual_time, item)
        # Ties in time go by number, so that a run is the same after a restart.
        heapq.heappush(self._order, (virtual_time, number))
        if isinstance(item, _WORK_TYPES):
            self._work.setdefault(item.device, set()).add(number)

    def pop(self) -> Item:
        """Advance to the next item and return it. Raises `IndexError` if the queue is empty."""
        while True:
            virtual_time, number = heapq.heappop(self._order)
            # Cancelled items stay in the heap: removing one from its middle would cost a search.
            if number in self.queue:
                break
        _, item = self.queue.pop(number)
        self.clock = virtual_time
        if isinstance(item, _WORK_TYPES):
            self._drop_number(item.device, number)
        return item

    def _drop_number(self, device: str, number: int) -> None:
        numbers = self._work[device]
        numbers.discard(number)
        if not numbers:
            del self._work[device]

    def drop_work(self, device: str, number: int | None = None) -> None:
        """Remove a device's work from the queue, for one round or for all."""
        for key in sorted(self._work.get(device, ())):
            item = self.queue[key][1]
            if isinstance(item, _WORK_TYPES) and number in (None, item.round):
                del self.queue[key]
                self._drop_number(device, key)

    def trainings(self) -> list[TrainingEnd]:
        return [item for _, item in self.queue.values() if isinstance(item, TrainingEnd)]

    def finish_round(self, number: int) -> None:
        self.now.down, self.now.up = self.down, self.up
        self.rounds[number] = self.now
        self.now = RoundNotes()

    def references(self) -> set[str]:
        """All strings of queued items, any of which may be the digest of a blob."""
        strings: set[str] = {*self.boards.values(), *self.tables.values()}
        for _, item in self.queue.values():
            if not isinstance(item, (on.DeviceBorn, on.DeviceDied, on.Ticked, WindowEnd)):
                # All strings are taken: one that isn't a digest does no harm, but a missing digest loses its blob.
                strings |= all_strings(vars(item))
        for event in self.unsent.values():
            strings |= all_strings(event.weights)
        return strings


_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class SavePace:
    """How often a state is saved.

    Attributes:
        interval_s: Seconds between two saves within a round.
        share: A save waits for at least this many times the duration of the last one (20: saving takes at most 1/20 of
            the time), except at the ends of short rounds.
        expensive_s: Duration of a save above which the ends of rounds are skipped, too.
    """

    interval_s: float = 5.0
    share: float = 20.0
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
        path, hint = self._folder / STATE_FILE, _restart_hint(self._folder)
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"can't read the simulation in {path} ({error})", hint=hint) from error
        config = self._folder / CONFIG_FILE
        try:
            settings = json.loads(config.read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"can't read the simulation's settings in {config} ({error})", hint=hint) from error
        try:
            if body["format"] != FORMAT:
                raise StorageError(f"{path} is of another version", expected=FORMAT, hint=hint)
            if differences := self._experiment.differences(settings):
                what = f"{config} has other settings, another model or other data"
                raise StorageError(what, got=differences, hint=hint)
            count, size = map(int, body["rounds"])
            history, notes = _finished_rounds(self._folder / ROUNDS_FILE, count, size)
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
    def lock(self) -> Iterator[bool]:
        """Hold the folder's lock.

        Yields whether any process has saved there since `load`. Raises `StorageError` if another process holds it, or
        the disk fails.
        """
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
        seconds_since_save = time.monotonic() - self._saved_at
        if round_ended:
            return self._save_s <= self._pace.expensive_s or seconds_since_save >= self._pace.share * self._save_s
        return seconds_since_save >= max(self._pace.interval_s, self._pace.share * self._save_s)

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
            "unsent": {k: asdict(v) for k, v in run.unsent.items()},
            "bytes": [run.down, run.up],
            "now": asdict(run.now),
            "queue": [
                [virtual_time, n, type(item).__name__, vars(item)] for n, (virtual_time, item) in run.queue.items()
            ],
        }
        write_atomically(self._folder / STATE_FILE, json.dumps(body).encode())
        self._logged_position = logged
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - started_at

    def _append_rounds(self, path: Path, run: SimulationState, history: Sequence[dict[str, Any]]) -> tuple[int, int]:
        """Append the rounds that finished since the last save."""
        logged_rounds, logged_bytes = self._logged_position
        rows = [json.dumps([row, asdict(run.rounds[row["round"]])]) + "\n" for row in history[logged_rounds:]]
        if not rows:
            return self._logged_position
        data = "".join(rows).encode()
        with storage_errors(f"can't write {path}"), path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(logged_bytes)  # rounds that a kill has made undone
            file.seek(logged_bytes)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return len(history), logged_bytes + len(data)

    def write_checkpoint(self, model: Model, number: int, weights: bytes) -> None:
        """Write a global model as `checkpoints/round-000010/model.onnx` and `weights.safetensors`. Raises
        `StorageFullError` if there is no room, and `StorageError` if the disk fails."""
        if self._folder is None:
            return
        write_model(self._folder / _CHECKPOINTS / f"round-{number:06d}", model, weights)


def _save_identity(folder: Path) -> tuple[int, ...] | None:
    """Identity of the last save in a folder; None before the first."""
    try:
        status = (folder / STATE_FILE).stat()
    except OSError:
        return None
    # The inode changes with every atomic replacement, even within one tick of the clock.
    return status.st_ino, status.st_mtime_ns, status.st_size


def _restart_hint(folder: Path) -> str:
    return f"Name another folder, or delete {folder} and give the command again: it starts again."


def _finished_rounds(path: Path, count: int, length: int) -> tuple[list[dict[str, Any]], dict[int, RoundNotes]]:
    """The coordinator's history and the simulation's notes of finished rounds."""
    if not count:
        return [], {}
    try:
        with path.open("rb") as file:
            lines = file.read(length).decode().splitlines()
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=_restart_hint(path.parent)) from error
    if len(lines) != count:
        hint = _restart_hint(path.parent)
        raise StorageError(f"{path} is damaged", expected=f"{count} rounds", got=len(lines), hint=hint)
    rows = [json.loads(line) for line in lines]
    return [row for row, _ in rows], {int(row["round"]): RoundNotes(**notes) for row, notes in rows}
