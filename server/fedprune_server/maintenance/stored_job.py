"""A job as its state folder stores it, for `fedprune-server doctor`, which checks it without the running server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.coordination import State
from fedprune_server.devices.plan_vs_actual import compare_latest
from fedprune_server.monitoring.job_watch import prediction_excesses
from fedprune_server.monitoring.situation import WatchedJob
from fedprune_server.observation.snapshot import JobSnapshot


@dataclass(frozen=True)
class StoredJob:
    """A job as it is stored.

    Attributes:
        settings: The settings of the last start, as the database has them.
        unplanned_devices: Devices for which no plan can be made, with the reason.
        is_running: Whether a server runs on it.
        group_sizes: Channels of each group of the model; empty if unknown.
        group_names: Names of the groups.
        revoked_devices: Revoked devices without another key.
        is_uncalibrated: Whether the global model's batch-norm statistics are averages of the boards'.
        boards_with_alerts: Boards that an open alert of the running server names.
    """

    folder: Path
    settings: Mapping[str, Any]
    state: State
    unplanned_devices: Mapping[str, Mapping[str, Any]]
    is_running: bool
    group_sizes: Sequence[int] = ()
    group_names: Sequence[str] = ()
    revoked_devices: frozenset[str] = frozenset()
    is_uncalibrated: bool = False
    boards_with_alerts: frozenset[str] = frozenset()

    @property
    def job_settings(self) -> Mapping[str, Any]:
        job: Mapping[str, Any] = self.settings.get("job", {})
        return job

    @property
    def name(self) -> str:
        return str(self.job_settings.get("name", "?"))

    @property
    def has_begun(self) -> bool:
        return bool(self.job_settings) or self.is_running

    @property
    def watched_job(self) -> WatchedJob:
        """The job as the alert rules see it."""
        job, state = self.job_settings, self.state
        snapshot = JobSnapshot(
            name=self.name,
            rounds=int(job.get("rounds", 0)),
            min_devices=int(job.get("devices", 1)),
            deadline_s=float(job.get("deadline_s", 600.0)),
            round=state.round,
            phase=state.phase,
            is_paused=state.paused,
            able_devices=state.devices.count(True) if self.is_running else 0,  # those online and not excluded
            known_devices=len(state.devices) + len(self.unplanned_devices),
            revoked_devices=self.revoked_devices & state.devices.keys(),
            comparisons=compare_latest(state),
        )
        away_devices = sorted(n for n, d in state.devices.items() if not d.online and n not in self.revoked_devices)
        excluded_boards = {n: d.excluded for n, d in sorted(state.devices.items()) if d.online and d.excluded}
        return WatchedJob(
            snapshot=snapshot,
            folder=self.folder,
            has_begun=self.has_begun,
            away_boards=away_devices,
            excluded_boards={} if snapshot.able_devices else excluded_boards,
            prediction_excesses=prediction_excesses(snapshot),
        )
