"""Assigns all connected devices to the only job of a server; a server of several jobs has a `DeviceScheduler`."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.wire.messages import Birth
from fedprune_server.engine.job_runner import JobRunner


class SingleJobScheduler:
    """Assigns every device to a job as soon as it connects. `connected` are the connected devices, each with its birth
    (the message by which it announces itself)."""

    def __init__(self, runner: JobRunner, connected: Mapping[str, Birth]) -> None:
        self._runner, self._connected = runner, connected

    def assignments(self) -> Mapping[str, str]:
        """The job of each connected device."""
        return dict.fromkeys(self._connected, self._runner.job.name)

    def on_connect(self, device: str, *, reconnected: bool) -> None:
        self._runner.assign([self._connected[device]])

    def on_disconnect(self, device: str, session: int) -> None:
        self._runner.unassign(device, session)

    def share_devices(self, now: float, *, finished: bool) -> None:
        """Do nothing: no device waits for a job."""
