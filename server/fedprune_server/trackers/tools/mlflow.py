"""Writes a run to MLflow: to its server, or to a database in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedprune_server.trackers.tracker import PROJECT, TrackedRun, Tracker, plain_name

_ROUND_METRIC = "round"
# MLflow's server refuses more parameters in one request.
_BATCH_SIZE = 100
# Characters of a parameter's value: the limit of MLflow's oldest versions, which holds in all.
_MAX_PARAMETER_LENGTH = 500


class MlflowTracker(Tracker):
    """A run of an MLflow server, or of a database in the run's folder."""

    destination_form = "ADDRESS"

    def __init__(self, destination: str) -> None:
        # Before the import, which reads them: no telemetry from a server, and no links among its log lines.
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
        experiment_entry = client.get_experiment_by_name(title)
        if experiment_entry is None:
            artifacts = None if self._destination else (run.folder / "mlartifacts").resolve().as_uri()
            experiment = client.create_experiment(title, artifact_location=artifacts)
        else:
            experiment = experiment_entry.experiment_id
        # MLflow chooses its own identifier for a run; a tag with ours finds it after a restart.
        runs = client.search_runs([experiment], f"tags.`fedprune.run` = '{name}'")
        if runs:
            self._run = runs[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return int(runs[0].data.metrics.get(_ROUND_METRIC, 0))
        self._run = client.create_run(experiment, tags={"fedprune.run": name}, run_name=run.title).info.run_id
        texts = ((plain_name(k), str(v)[:_MAX_PARAMETER_LENGTH]) for k, v in run.parameters.items())
        params = [self._entities.Param(key, text) for key, text in texts]
        for first in range(0, len(params), _BATCH_SIZE):
            client.log_batch(self._run, params=params[first : first + _BATCH_SIZE])
        return 0

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        others = {k: v for k, v in values.items() if k != _ROUND_METRIC}
        metrics = [
            self._entities.Metric(plain_name(name), value, int(at * 1000), number)
            for name, value in {**others, _ROUND_METRIC: number}.items()
        ]
        for first in range(0, len(metrics), _BATCH_SIZE):  # the round's number comes last: then it is complete
            self._client.log_batch(self._run, metrics=metrics[first : first + _BATCH_SIZE])

    def keep(self, folder: Path) -> None:
        self._client.log_artifacts(self._run, str(folder))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
