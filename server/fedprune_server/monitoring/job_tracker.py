"""Writes a job's rounds to experiment trackers, with the columns of a simulation's rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune_export.bundles.inference import write_model
from fedprune_export.pruning.model import Model
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.monitoring.round_rows import RoundNotes, WideRows, make_round_row
from fedprune_server.monitoring.tracking import END_TIMEOUT_S, MODEL_FOLDER, Tracking, flat_parameters
from fedprune_server.observation.observer import LoopBlocked, RoundEnded, ServerEnding, TurnEvent, handle_each
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.trackers.tracker import TrackedRun

# Columns that only simulations can fill: a server can't count the MACs of its boards.
_SIMULATION_COLUMNS = ("training_macs", "active_macs", "limited")

_BYTE_COLUMNS = ("total_bytes_down", "total_bytes_up")


class JobTracker:
    """Writes a job's finished rounds, and at the end its model, to experiment trackers.

    `history` has the job's finished rounds: those that an earlier start couldn't write are written now, without their
    bytes. Raises `MissingExtraError` if a tracker's library is not installed.
    """

    def __init__(
        self,
        targets: Sequence[TrackTarget],
        job: Job,
        model: Model,
        state: Path,
        store: BlobStore,
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        self._job, self._model, self._store, self._judge = job.name, model, store, job.recipe.judged_by
        settings = {"fedprune": __version__, "job": job.to_dict(), "model": model.architecture.name}
        self._tracking = Tracking(targets, TrackedRun(job.name, state, flat_parameters(settings)), state)
        self._rows = WideRows(self._judge)
        self._started_at: float | None = None
        self._is_started = False
        for entry in history:
            self._write(entry, RoundNotes(), without=_BYTE_COLUMNS)

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        if snapshot.name != self._job:
            return
        if not self._is_started:
            if all(isinstance(event.payload, (LoopBlocked, ServerEnding)) for event in events):
                return  # a server that is refused at its start, such as a copy, leaves no trace there
            self._is_started = True
            self._tracking.start()
        handle_each(events, self._handle)

    def _handle(self, event: TurnEvent) -> None:
        match event.payload:
            case RoundEnded(summary, down, up):
                self._write(summary, RoundNotes(down, up))
            case do.Finish(digest):
                read, model = self._store.read, self._model
                self._tracking.finish(lambda folder: write_model(folder / MODEL_FOLDER, model, read(digest)))

    def close(self) -> None:
        self._tracking.close(END_TIMEOUT_S)

    def _write(self, entry: Mapping[str, Any], notes: RoundNotes, without: Collection[str] = ()) -> None:
        if self._started_at is None:
            self._started_at = entry["at"]  # a server keeps no earlier time of its job
        notes.updates = sum(device["progress"] == Progress.FOLDED.value for device in entry["devices"].values())
        row = make_round_row(entry, notes, self._started_at, self._judge)
        values = self._rows.row(row)
        self._tracking.write(
            row.round, {k: v for k, v in values.items() if k not in (*_SIMULATION_COLUMNS, *without)}, entry["at"]
        )
