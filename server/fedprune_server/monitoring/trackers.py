"""Runs in the user's own experiment tracker: TensorBoard, MLflow or Weights & Biases, by their own libraries.

A thread writes, so that the run never waits for a disk or another server. A tracker that fails is logged once and left
off; the next start of the same run writes what it lacks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import MissingExtraError, reason
from fedprune_server.config.track_targets import MLFLOW, TENSORBOARD, WANDB, TrackTarget

log = logging.getLogger("fedprune.server")

FILE = "tracking.json"
"""In a run's state folder: what the run is called in each tracker, and how many rounds that has."""

PROJECT = "fedprune"
"""MLflow's experiment and Weights & Biases' project, unless others are given."""

ENDS_S = 10.0
"""Seconds for which the end of a server, or of an interrupted simulation, waits for trackers."""

MODEL = "model"
"""Folder of the model in a run's files."""

_ROUND = "round"
_BATCH = 100
_LONGEST = 500
"""Characters of a parameter: what MLflow took in all its versions."""

Files = Callable[[Path], None]
"""Writes a finished run's files into a folder."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers show it.

    Attributes:
        title: Its name.
        folder: Where a tracker without a destination writes.
        parameters: Its configuration.
    """

    title: str
    folder: Path
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class Tracker(ABC):
    """One run in one tracker. A constructor imports the library; no other method is called before `open`."""

    @abstractmethod
    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        """Begin or continue a run.

        Args:
            name: The run's identifier, which no other run has.
            rounds: How many rounds it has, as far as is noted; 0 for a new one.

        Returns:
            How many rounds it has.
        """

    @abstractmethod
    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        """Write a round durably; `at` is in seconds since 1970."""

    @abstractmethod
    def keep(self, folder: Path) -> None:
        """Keep the files of a folder with the run, where the tracker can."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """End writing; a run that isn't finished is continued by the next start."""


class TensorBoardTracker(Tracker):
    """A folder of event files for each run, within the destination; each start writes a file of its own."""

    def __init__(self, destination: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter
        self._tensors, self._shapes, self._types = tensor_pb2, tensor_shape_pb2, types_pb2
        self._destination = destination

    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        place = Path(self._destination) if self._destination else run.folder / "tensorboard"
        place /= f"{_plain(run.title)}-{name[:8]}"
        place.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads a run's files in the order of their names.
        path = place / f"events.out.tfevents.{int(now):010d}.{_plain(socket.gethostname())}.{time.time_ns()}"
        self._file = self._record_writer(path.open("xb"))
        self._add(wall_time=now, file_version="brain.Event:2")
        # Of a round that a kill has cut off, and that is written again, TensorBoard shows the second.
        restart = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(wall_time=now, step=rounds + 1, session_log=restart)
        if not rounds:
            self._add(wall_time=now, summary=self._text("configuration", run.parameters))
        self._file.flush()
        return rounds

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        found = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(wall_time=at, step=number, summary=self._summaries.Summary(value=found))
        self._file.flush()

    def keep(self, folder: Path) -> None:
        """TensorBoard keeps no files."""

    def close(self, *, finished: bool) -> None:
        self._file.close()

    def _add(self, **event: Any) -> None:
        self._file.write(self._events.Event(**event).SerializeToString())

    def _text(self, tag: str, parameters: Mapping[str, Any]) -> Any:
        rows = "\n".join(f"| {key} | {value} |" for key, value in parameters.items())
        shown = self._tensors.TensorProto(
            dtype=self._types.DT_STRING,
            string_val=[f"| parameter | value |\n|---|---|\n{rows}".encode()],
            tensor_shape=self._shapes.TensorShapeProto(),
        )
        kind = self._summaries.SummaryMetadata(
            plugin_data=self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        )
        return self._summaries.Summary(value=[self._summaries.Summary.Value(tag=tag, metadata=kind, tensor=shown)])


class MlflowTracker(Tracker):
    """A run of an MLflow server, or of a database in the run's folder."""

    def __init__(self, destination: str) -> None:
        for unwanted in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
            os.environ.setdefault(unwanted, "true")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._client_class = entities, MlflowClient
        self._destination = destination or os.environ.get("MLFLOW_TRACKING_URI", "")

    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        self._client = client = self._client_class(
            self._destination or f"sqlite:///{(run.folder / 'mlflow.db').resolve()}"
        )
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(title)
        if known is None:
            artifacts = None if self._destination else (run.folder / "mlartifacts").resolve().as_uri()
            experiment = client.create_experiment(title, artifact_location=artifacts)
        else:
            experiment = known.experiment_id
        # The identifier that MLflow gives a run is found again by ours.
        found = client.search_runs([experiment], f"tags.`fedprune.run` = '{name}'")
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return int(found[0].data.metrics.get(_ROUND, 0))
        self._run = client.create_run(experiment, tags={"fedprune.run": name}, run_name=run.title).info.run_id
        given = [self._entities.Param(_plain(key), str(value)[:_LONGEST]) for key, value in run.parameters.items()]
        for first in range(0, len(given), _BATCH):
            client.log_batch(self._run, params=given[first : first + _BATCH])
        return 0

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        metrics = [
            self._entities.Metric(_plain(name), value, int(at * 1000), number)
            for name, value in ({k: v for k, v in values.items() if k != _ROUND} | {_ROUND: number}).items()
        ]
        for first in range(0, len(metrics), _BATCH):  # the round's number comes last: then it is complete
            self._client.log_batch(self._run, metrics=metrics[first : first + _BATCH])

    def keep(self, folder: Path) -> None:
        self._client.log_artifacts(self._run, str(folder))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class WandbTracker(Tracker):
    """A run of Weights & Biases; where there is no key, one in files that `wandb sync` uploads."""

    def __init__(self, destination: str) -> None:
        import wandb

        self._wandb, self._destination = wandb, destination

    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        entity, _, project = self._destination.rpartition("/")
        chosen = os.environ.get("WANDB_MODE") or self._wandb.login(prompt=False)
        self._run = self._wandb.init(
            entity=entity or None,
            project=project or os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=run.title,
            config=dict(run.parameters),
            dir=run.folder,
            mode=None if chosen else "offline",
            resume="allow",
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        return rounds

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        self._run.log(dict(values), step=number, commit=True)

    def keep(self, folder: Path) -> None:
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="model")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):  # add_dir prints a line
            artifact.add_file(str(path), path.relative_to(folder).as_posix())
        self._run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self._run.finish()


_TRACKERS: dict[str, type[Any]] = {TENSORBOARD: TensorBoardTracker, MLFLOW: MlflowTracker, WANDB: WandbTracker}


@dataclass
class _Target:
    """A tracker of the run, with what is noted of it.

    Attributes:
        key: The tracker in the note.
        name: The run's identifier there.
        rounds: Rounds that it has.
        kept: Rounds that the run had when its files were kept.
    """

    key: str
    tracker: Tracker
    name: str
    rounds: int = 0
    kept: int = 0


class Tracking:
    """Writes a run's rounds to trackers, on a thread of its own.

    Args:
        state: The folder of the note by which the next start continues; None keeps none.

    Raises:
        MissingExtraError: A tracker's library is not installed.
    """

    def __init__(self, targets: Sequence[TrackTarget], run: TrackedRun, state: Path | None) -> None:
        self._run, self._state = run, state
        self._targets = [_Target(str(target), _made(target), uuid.uuid4().hex) for target in targets]
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._last = 0
        self._finished = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Open the trackers; only now, so that a start that is refused leaves no trace in them."""
        if self._thread is None:
            noted = {} if self._state is None else _noted(self._state / FILE)
            for target in self._targets:
                target.name, target.rounds, target.kept = noted.get(target.key, (target.name, 0, 0))
            self._thread = threading.Thread(target=self._work, name="fedprune-tracking", daemon=True)
            self._thread.start()

    def write(self, number: int, values: Mapping[str, Any], at: float) -> None:
        """Write a round, to those that haven't got it; `values` that are no finite numbers are left out."""
        self._last = number
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self._queue.put(lambda: self._write(number, numbers, at))

    def finish(self, files: Files) -> None:
        """Mark the run as finished, and keep its files with those that haven't got them."""
        self._finished = True
        last = self._last
        self._queue.put(lambda: self._keep(last, files))

    def close(self, timeout_s: float | None = None) -> None:
        """End, once all is written or the time is over."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("track: not everything was written within %.0f s; the next start writes the rest", timeout_s)

    def _work(self) -> None:
        for target in list(self._targets):
            with self._left_off(target):
                target.rounds = target.tracker.open(self._run, target.name, target.rounds)
                self._note()
        while (task := self._queue.get()) is not None:
            task()
        for target in list(self._targets):
            with self._left_off(target):
                target.tracker.close(finished=self._finished)

    def _write(self, number: int, values: Mapping[str, float], at: float) -> None:
        for target in list(self._targets):
            if number > target.rounds:
                with self._left_off(target):
                    target.tracker.write(number, values, at)
                    target.rounds = number
                    self._note()

    def _keep(self, last: int, files: Files) -> None:
        lacking = [target for target in self._targets if target.kept < last]
        if not lacking:
            return
        try:
            with TemporaryDirectory(prefix="fedprune-tracked-") as scratch:
                files(Path(scratch))
                for target in lacking:
                    with self._left_off(target):
                        target.tracker.keep(Path(scratch))
                        target.kept = last
                        self._note()
        except Exception as error:  # noqa: BLE001 - else the thread ends, and closes no tracker
            log.warning("track: can't write the run's files: %s: %s", type(error).__name__, reason(error))

    @contextmanager
    def _left_off(self, target: _Target) -> Iterator[None]:
        """Leave off a tracker that fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a library of others, and no reason to end the run
            self._targets.remove(target)
            log.warning("track: %s fails and is left off: %s: %s", target.key, type(error).__name__, reason(error))

    def _note(self) -> None:
        if self._state is not None:
            known = _noted(self._state / FILE) | {t.key: (t.name, t.rounds, t.kept) for t in self._targets}
            body = {key: {"name": name, "rounds": rounds, "kept": kept} for key, (name, rounds, kept) in known.items()}
            write_whole(self._state / FILE, json.dumps(body, indent=1).encode(), sync=False)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as parameters such as `job.recipe.lr`; lists as JSON, without what is None or empty."""
    found: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float, bool)):
            found[f"{prefix}{key}"] = value
        elif value:
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found


def _made(target: TrackTarget) -> Tracker:
    try:
        made: Tracker = _TRACKERS[target.tool](target.destination)
    except ModuleNotFoundError as error:
        needed = (error.name or target.tool).partition(".")[0]
        what = f"track = {target.tool} needs {needed}, which is not installed"
        raise MissingExtraError(what, extra=target.tool) from error
    return made


def _noted(path: Path) -> dict[str, tuple[str, int, int]]:
    """Identifier, rounds and kept rounds by tracker, as an earlier start has noted; empty if nothing can be read."""
    try:
        body = json.loads(path.read_bytes())
        return {
            str(key): (uuid.UUID(row["name"]).hex, int(row["rounds"]), int(row["kept"])) for key, row in body.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _plain(text: str) -> str:
    """A name that MLflow takes as a key, and every file system."""
    return re.sub(r"[^\w.\- ]", "-", text, flags=re.ASCII)
