"""Writes a run to Weights & Biases, or into files that `wandb sync` uploads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedprune_server.trackers.tracker import PROJECT, TrackedRun, Tracker


class WandbTracker(Tracker):
    """A run of Weights & Biases; where there is no key, one in files that `wandb sync` uploads."""

    destination_form = "[ENTITY/]PROJECT"

    def __init__(self, destination: str) -> None:
        import wandb

        self._wandb, self._destination = wandb, destination

    def open(self, run: TrackedRun, name: str, rounds: int) -> int:
        entity, _, project = self._destination.rpartition("/")
        is_online = os.environ.get("WANDB_MODE") or self._wandb.login(prompt=False)
        self._run = self._wandb.init(
            entity=entity or None,
            project=project or os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=run.title,
            config=dict(run.parameters),
            dir=run.folder,
            mode=None if is_online else "offline",
            resume="allow",
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        return rounds

    def write(self, number: int, values: Mapping[str, float], at: float) -> None:
        self._run.log(dict(values), step=number, commit=True)

    def keep(self, folder: Path) -> None:
        artifact = self._wandb.Artifact(f"run-{self._run.id}", type="model")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):  # not `add_dir`, which prints a line
            artifact.add_file(str(path), path.relative_to(folder).as_posix())
        self._run.log_artifact(artifact)

    def close(self, *, finished: bool) -> None:
        self._run.finish()
