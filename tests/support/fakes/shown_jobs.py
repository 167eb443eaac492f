"""Jobs as observers see them, without a server."""

from dataclasses import replace
from typing import Any

from fedprune.coordination import Phase
from fedprune.jobs.state import Progress
from fedprune_server.observation.observer import Observer, TurnEvent
from fedprune_server.observation.snapshot import DeviceSnapshot, FleetSnapshot, JobSnapshot
from support.fakes.tiny_job import JOB

TRAINING_SNAPSHOT = JobSnapshot(
    name=JOB.name, rounds=5, round=2, phase=Phase.TRAINING, able_devices=3, known_devices=3, deadline_s=JOB.deadline_s,
    device_states={"working": 2, "idle": 1}, parts_by_progress={Progress.OFFERED: 2}, bytes_down=700, bytes_up=300,
    queues={"commands": 1, "uploads": 0}, fleet=FleetSnapshot(quarantines={"eve": (2000.0, "noise")}),
)  # fmt: skip


def show(
    observer: Observer, *happenings: Any, at: float = 1000.0, snapshot: JobSnapshot = TRAINING_SNAPSHOT, **values: Any
) -> None:
    """Show a turn of a job in which this has happened; `values` are what the snapshot has of its own."""
    observer.observe(replace(snapshot, **values), [TurnEvent(at, what) for what in happenings])


def boards(online: str = "", offline: str = "", **values: Any) -> dict[str, DeviceSnapshot]:
    """Devices of a job that have a letter for a name."""
    names = [(name, True) for name in online] + [(name, False) for name in offline]
    return {n: DeviceSnapshot(name=n, online=here, connected=here, profile="pi", **values) for n, here in names}
