"""Rounds for experiment trackers: the rows of `rounds.parquet`, of a simulation or of a server's job."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.coordination import Phase
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune_export.pruning.model import Model
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.trackers import TrackedRun, Tracking, flat
from fedprune_server.monitoring.view import JobView
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.measure import RoundNotes
from fedprune_server.simulation.results.record import Record, round_row
from fedprune_server.simulation.results.report import write_report
from fedprune_server.simulation.results.run_folder import WideRows
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.state import write_model

_ENDS_S = 10.0
"""Seconds for which the end of a server, or of an interrupted simulation, waits for trackers."""

_MODEL = "model"
"""Folder of the model in a run's files."""

_LEFT_OUT = ("title", "fingerprint", "devices")
"""Settings that trackers have already, or that are as long as the fleet."""


_SIMULATED = ("training_macs", "active_macs")
"""Columns that only simulations can fill."""

_BYTES = ("total_bytes_down", "total_bytes_up")


@contextmanager
def tracked(
    targets: Sequence[TrackTarget], experiment: Experiment, folder: Path | None = None, state: str = "run"
) -> Iterator[Callable[[Simulation], None]]:
    """A function that writes a simulation's new rounds, to be called at its start and after every round.

    Args:
        folder: The run's folder; None for the current one, and for a run that is never continued.
        state: Subfolder of the run's saved state.

    Raises:
        MissingExtraError: A tracker's library is not installed.
    """
    if not targets:
        yield lambda simulation: None
        return
    settings = {k: v for k, v in experiment.settings().items() if k not in _LEFT_OUT}
    facts = {"data": experiment.partition.data, "fleet": len(experiment.devices)}
    run = TrackedRun(experiment.title, folder or Path(), flat(settings | facts))
    tracking = Tracking(targets, run, None if folder is None else folder / state)
    kind = experiment.job.recipe.judged_by
    rows, told = WideRows(kind), 0

    def write(simulation: Simulation) -> None:
        nonlocal told
        tracking.start()
        history = simulation.state.history
        for entry in history[told:]:
            notes = simulation.notes.get(entry["round"], RoundNotes())
            row = round_row(entry, notes, 0.0, kind)
            tracking.write(row.round, rows.row(row), time.time())
        told = len(history)
        if simulation.state.phase is Phase.FINISHED:
            record, weights = simulation.record(), simulation.store.read(simulation.state.model)
            tracking.finish(partial(_write_files, record, experiment.model, weights))

    try:
        yield write
    except BaseException:
        tracking.close(_ENDS_S)
        raise
    tracking.close()


def _write_files(record: Record, model: Model, weights: bytes, folder: Path) -> None:
    write_report(folder, record)
    write_model(folder / _MODEL, model, weights)


class JobTracker(Observer):
    """Writes a server's finished rounds, and at the end its model, to experiment trackers.

    Args:
        state: The job's state folder.
        history: The job's finished rounds: what an earlier start couldn't write is written now, without its bytes.

    Raises:
        MissingExtraError: A tracker's library is not installed.
    """

    def __init__(
        self,
        targets: Sequence[TrackTarget],
        job: Job,
        model: Model,
        state: Path,
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        self._model, self._kind = model, job.recipe.judged_by
        settings = {"fedprune": __version__, "job": job.to_dict(), "model": model.architecture.name}
        self._tracking = Tracking(targets, TrackedRun(job.name, state, flat(settings)), state)
        self._rows = WideRows(self._kind)
        self._began: float | None = None
        for entry in history:
            self._write(entry, RoundNotes(), without=_BYTES)

    def turned(self, seconds: Callable[[], float], seen: JobView) -> None:
        """Open the trackers only now: a server that is refused, such as another one's copy, leaves no trace there."""
        self._tracking.start()

    def round_over(self, summary: dict[str, Any], now: float, seen: JobView) -> None:
        down, up = seen.registry.total
        self._write(summary, RoundNotes(down, up))

    def finished(self, seen: JobView) -> None:
        store, digest = seen.store, seen.state.model
        self._tracking.finish(lambda folder: write_model(folder / _MODEL, self._model, store.read(digest)))

    def close(self) -> None:
        self._tracking.close(_ENDS_S)

    def _write(self, entry: Mapping[str, Any], notes: RoundNotes, without: Collection[str] = ()) -> None:
        if self._began is None:
            self._began = entry["at"]  # a server keeps no earlier time of its job
        notes.updates = sum(part["progress"] == Progress.FOLDED.value for part in entry["devices"].values())
        row = round_row(entry, notes, self._began, self._kind)
        values = self._rows.row(row)
        self._tracking.write(
            row.round, {k: v for k, v in values.items() if k not in (*_SIMULATED, *without)}, entry["at"]
        )
