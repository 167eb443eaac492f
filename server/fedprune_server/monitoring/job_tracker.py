"""A job's rounds for experiment trackers, with the columns of a simulation's `rounds.parquet`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune_export.bundles.inference import write_model
from fedprune_export.pruning.model import Model
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.monitoring.observer import Observer
from fedprune_server.monitoring.round_rows import RoundNotes, WideRows, round_row
from fedprune_server.monitoring.trackers import ENDS_S, MODEL, TrackedRun, Tracking, flat
from fedprune_server.monitoring.view import JobView

_SIMULATED = ("training_macs", "active_macs", "limited")
"""Columns that only simulations can fill."""

_BYTES = ("total_bytes_down", "total_bytes_up")


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
        self._tracking.finish(lambda folder: write_model(folder / MODEL, self._model, store.read(digest)))

    def close(self) -> None:
        self._tracking.close(ENDS_S)

    def _write(self, entry: Mapping[str, Any], notes: RoundNotes, without: Collection[str] = ()) -> None:
        if self._began is None:
            self._began = entry["at"]  # a server keeps no earlier time of its job
        notes.updates = sum(part["progress"] == Progress.FOLDED.value for part in entry["devices"].values())
        row = round_row(entry, notes, self._began, self._kind)
        values = self._rows.row(row)
        self._tracking.write(
            row.round, {k: v for k, v in values.items() if k not in (*_SIMULATED, *without)}, entry["at"]
        )
