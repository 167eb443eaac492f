"""Writes the rounds of a run to the user's experiment trackers.

A thread writes, so that the run never waits for a disk or another server. A tracker that fails is logged once and left
off; the next start of the same run writes what it lacks.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import error_reason
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.trackers.tracker import TrackedRun, Tracker, make_tracker

log = logging.getLogger("fedprune.server")

# In a run's state folder: the run's identifier in each tracker, and how many rounds the tracker has. Without it the
# next start would begin a second run there.
NOTE_FILE = "tracking.json"

# Seconds that the end of a server, or of an interrupted simulation, waits for trackers: the next start writes the rest.
END_TIMEOUT_S = 10.0

# The folder of the model among a run's files, as it appears in a tracker.
MODEL_FOLDER = "model"

# Writes a finished run's files into a folder; called only if a tracker lacks them, because a model may be large.
WriteFiles = Callable[[Path], None]


@dataclass
class _Target:
    """A tracker of the run, with what is noted of it.

    Attributes:
        key: The tracker in the note.
        name: The run's identifier there.
        rounds: Rounds that it has.
        rounds_with_files: Rounds that the run had when its files were kept.
    """

    key: str
    tracker: Tracker
    name: str
    rounds: int = 0
    rounds_with_files: int = 0


class Tracking:
    """Writes a run's rounds to trackers, on a thread of its own.

    In the folder `state` it notes how far it came, so that the next start continues there; None for no note. Raises
    `MissingExtraError` if a tracker's library is not installed.
    """

    def __init__(self, targets: Sequence[TrackTarget], run: TrackedRun, state: Path | None) -> None:
        self._run, self._state = run, state
        trackers = [(str(target), make_tracker(target.tool, target.destination)) for target in targets]
        self._targets = [_Target(key, tracker, uuid.uuid4().hex) for key, tracker in trackers]
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._last_round = 0
        self._is_finished = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the trackers; only now, so that a start that is refused leaves no trace in them."""
        if self._thread is None:
            notes = {} if self._state is None else _read_note(self._state / NOTE_FILE)
            for target in self._targets:
                target.name, target.rounds, target.rounds_with_files = notes.get(target.key, (target.name, 0, 0))
            self._thread = threading.Thread(target=self._run_tasks, name="fedprune-tracking", daemon=True)
            self._thread.start()

    def write(self, number: int, values: Mapping[str, Any], at: float) -> None:
        """Write a round to the trackers that lack it, without values that are no finite numbers."""
        self._last_round = number
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self._queue.put(lambda: self._write(number, numbers, at))

    def finish(self, files: WriteFiles) -> None:
        """Mark the run as finished, and keep its files with the trackers that lack them."""
        self._is_finished = True
        last = self._last_round
        self._queue.put(lambda: self._keep_files(last, files))

    def close(self, timeout_s: float | None = None) -> None:
        """End, once all is written or the time is over."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("track: not everything was written within %.0f s; the next start writes the rest", timeout_s)

    def _run_tasks(self) -> None:
        for target in list(self._targets):
            with self._drop_on_failure(target):
                target.rounds = target.tracker.open(self._run, target.name, target.rounds)
                self._write_note()
        while (task := self._queue.get()) is not None:
            task()
        for target in list(self._targets):
            with self._drop_on_failure(target):
                target.tracker.close(finished=self._is_finished)

    def _write(self, number: int, values: Mapping[str, float], at: float) -> None:
        for target in list(self._targets):
            if number > target.rounds:
                with self._drop_on_failure(target):
                    target.tracker.write(number, values, at)
                    target.rounds = number
                    self._write_note()

    def _keep_files(self, last: int, files: WriteFiles) -> None:
        targets = [target for target in self._targets if target.rounds_with_files < last]
        if not targets:
            return
        try:
            with TemporaryDirectory(prefix="fedprune-tracked-") as scratch:
                files(Path(scratch))
                for target in targets:
                    with self._drop_on_failure(target):
                        target.tracker.keep(Path(scratch))
                        target.rounds_with_files = last
                        self._write_note()
        except Exception as error:  # noqa: BLE001 - else the thread ends, and closes no tracker
            log.warning("track: can't write the run's files: %s: %s", type(error).__name__, error_reason(error))

    @contextmanager
    def _drop_on_failure(self, target: _Target) -> Iterator[None]:
        """Leave off a tracker that fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a library of others, and no reason to end the run
            self._targets.remove(target)
            text = f"{type(error).__name__}: {error_reason(error)}"
            log.warning("track: %s fails and is left off: %s", target.key, text)

    def _write_note(self) -> None:
        if self._state is not None:
            own_notes = {t.key: (t.name, t.rounds, t.rounds_with_files) for t in self._targets}
            notes = _read_note(self._state / NOTE_FILE) | own_notes
            body = {key: {"name": name, "rounds": rounds, "kept": kept} for key, (name, rounds, kept) in notes.items()}
            # Not synced in every round: after a power cut a few rounds are written to the trackers again.
            write_atomically(self._state / NOTE_FILE, json.dumps(body, indent=1).encode(), sync=False)


def flat_parameters(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as parameters such as `job.recipe.lr`; lists as JSON, without what is None or empty."""
    parameters: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            parameters |= flat_parameters(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float, bool)):
            parameters[f"{prefix}{key}"] = value
        elif value:
            parameters[f"{prefix}{key}"] = json.dumps(value, default=str)
    return parameters


def _read_note(path: Path) -> dict[str, tuple[str, int, int]]:
    """Read the note of an earlier start: identifier, rounds and kept rounds by tracker; empty if it can't be read."""
    try:
        body = json.loads(path.read_bytes())
        return {
            str(key): (uuid.UUID(row["name"]).hex, int(row["rounds"]), int(row["kept"])) for key, row in body.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
