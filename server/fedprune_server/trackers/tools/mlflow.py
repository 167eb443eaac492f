"""MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedprune_server.trackers.tracker import PROJECT, TrackedRun, Tracker, plain_name

_ROUND = "round"
_BATCH = 100
_LONGEST = 500
"""Characters of a parameter: what MLflow took in all its versions."""


class MlflowTracker(Tracker):
    """A run of an MLflow server, or of a database in the run's folder."""

    place = "ADDRESS"

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
        given = [self._entities.Param(plain_name(key), str(value)[:_LONGEST]) for key, value in run.parameters.items()]
        for first in range(0, len(given), _BATCH):
            client.log_batch(self._run, params=given[first : first + _BATCH])
        return 0

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        metrics = [
            self._entities.Metric(plain_name(name), value, int(at * 1000), number)
            for name, value in ({k: v for k, v in values.items() if k != _ROUND} | {_ROUND: number}).items()
        ]
        for first in range(0, len(metrics), _BATCH):  # the round's number comes last: then it is complete
            self._client.log_batch(self._run, metrics=metrics[first : first + _BATCH])

    def keep(self, folder: Path) -> None:
        self._client.log_artifacts(self._run, str(folder))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
