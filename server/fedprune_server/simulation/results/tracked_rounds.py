"""Write a simulation's rounds to experiment trackers, with the columns of `results.rows.round_rows`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedprune.coordination import Phase
from fedprune_export.bundles.inference import write_model
from fedprune_server.config.track_targets import TrackTarget
from fedprune_server.monitoring.round_rows import RoundNotes, WideRows, make_round_row
from fedprune_server.monitoring.tracking import END_TIMEOUT_S, MODEL_FOLDER, Tracking, flat_parameters
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.results.report import write_report
from fedprune_server.simulation.results.run_folder import RUN_STATE_FOLDER
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.trackers.tracker import TrackedRun

_EXCLUDED_SETTINGS = ("title", "devices")  # settings that trackers have already, or that are as long as the fleet


@contextmanager
def track_rounds(
    targets: Sequence[TrackTarget], experiment: Experiment, folder: Path | None = None
) -> Iterator[Callable[[Simulation], None]]:
    """Track a simulation. Yields a function that writes its new rounds, to be called at the start and after every
    round. `folder` is the run's, None for the current one and for a run that is never continued. Raises
    `MissingExtraError` if a tracker's library is not installed."""
    if not targets:
        yield lambda simulation: None
        return
    settings = {k: v for k, v in experiment.settings().items() if k not in _EXCLUDED_SETTINGS}
    facts = {"data": experiment.partition.data, "fleet": len(experiment.devices)}
    run = TrackedRun(experiment.title, folder or Path(), flat_parameters(settings | facts))
    tracking = Tracking(targets, run, None if folder is None else folder / RUN_STATE_FOLDER)
    kind = experiment.job.recipe.judged_by
    rows, tracked_count = WideRows(kind), 0

    def write(simulation: Simulation) -> None:
        nonlocal tracked_count
        tracking.start()
        history = simulation.state.history
        for entry in history[tracked_count:]:
            row = make_round_row(entry, simulation.notes.get(entry["round"], RoundNotes()), 0.0, kind)
            tracking.write(row.round, rows.row(row), time.time())
        tracked_count = len(history)
        if simulation.state.phase is Phase.FINISHED:
            record, weights = simulation.record(), simulation.store.read(simulation.state.model)

            def write_files(folder: Path) -> None:
                write_report(folder, record)
                write_model(folder / MODEL_FOLDER, experiment.model, weights)

            tracking.finish(write_files)

    try:
        yield write
    # An interrupted run waits a little for trackers, and then ends: they may hang on a network.
    except BaseException:
        tracking.close(END_TIMEOUT_S)
        raise
    tracking.close()
