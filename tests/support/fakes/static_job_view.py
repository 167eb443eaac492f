"""A job that doesn't move, for those who look on."""

from __future__ import annotations

from fedprune_server.devices.job_snapshot import JobSnapshot
from fedprune_server.monitoring.view import Facts
from support.fakes.tiny_job import JOB

FACTS = Facts(
    2, 5, "training", {"working": 2, "idle": 1}, {"offered": 2}, 1, 700, 300, True, {"commands": 1, "uploads": 0}
)


class StillJob:
    """What an observer sees of it."""

    job = JOB

    def snapshot(self) -> JobSnapshot:
        """Nothing is shown of it."""
        raise NotImplementedError

    def facts(self) -> Facts:
        """Always the same."""
        return FACTS
