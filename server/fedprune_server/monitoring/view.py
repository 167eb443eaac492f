"""Observers' view of a job: its state and devices, the table for people, and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune.model.architecture import Architecture
from fedprune_server.devices.job_snapshot import JobSnapshot
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.executor.background import BackgroundExecutor
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import Wire
from fedprune_server.transfer.uploads import Uploads

UNDER_WAY = (Progress.QUEUED, Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)
"""Progress of parts that something is still awaited of."""


@dataclass(frozen=True)
class Facts:
    """Figures of a job at one moment.

    Attributes:
        devices: Devices by state: `working`, `idle`, `excluded`, `offline` or `revoked`.
        tasks: Parts of the round by progress.
        bytes_down: Payload bytes to all devices, over all starts.
        bytes_up: The same from them.
        queues: What waits, by queue.
    """

    round: int
    rounds: int
    phase: str
    devices: Mapping[str, int]
    tasks: Mapping[str, int]
    quarantined: int
    bytes_down: int
    bytes_up: int
    connected: bool
    queues: Mapping[str, int] = field(default_factory=dict)


OFFLINE = "offline"
"""The state of a device that isn't connected."""


@dataclass(frozen=True)
class JobView:
    """Read-only view of a job.

    Attributes:
        weight: Its weight in sharing devices with other jobs.
        store: Blobs that are available without waiting.
        clock: Seconds since 1970.
        away: The state of a device that isn't connected.
        members: Returns the names of the fleet's members, the same object until they change; None where every device
            may take part.
    """

    job: Job
    architecture: Architecture
    state: State
    registry: DeviceRegistry
    quarantine: Quarantine
    link: Wire
    executor: BackgroundExecutor
    uploads: Uploads
    outbox: Outbox
    weight: float
    store: BlobStore
    clock: Callable[[], float]
    away: str = OFFLINE
    members: Callable[[], Collection[str]] | None = None
    _looked_up: list[tuple[Collection[str] | None, Collection[str]]] = field(
        default_factory=lambda: [(None, ())], init=False, repr=False, compare=False
    )

    def revoked(self) -> Collection[str]:
        """Devices of the job that are no longer members."""
        if self.members is None:
            return ()
        members, (known, found) = self.members(), self._looked_up[0]
        if known is not members:  # a device that the job gets to know later is a member then
            found = {name for name in self.state.devices if name not in members}
            self._looked_up[0] = members, found
        return found

    def snapshot(self) -> JobSnapshot:
        pulled = {n: p for n in self.state.tasks if (p := self.uploads.progress(n)) is not None}
        found = self.registry.snapshot(self.clock(), self.link.connected, pulled)
        if self.away == OFFLINE:
            return found
        return replace(found, rows=tuple(replace(r, state=self.away) if r.state == OFFLINE else r for r in found.rows))

    def facts(self) -> Facts:
        """Figures of the job, by a look at every device."""
        devices: Counter[str] = Counter()
        revoked = self.revoked()
        for name, device in self.state.devices.items():
            task = self.state.tasks.get(name)
            works = task is not None and task.progress in UNDER_WAY and self.state.awaits(task)
            online = "working" if works else "idle"
            away = "revoked" if name in revoked else OFFLINE
            devices["excluded" if device.excluded else online if device.online else away] += 1
        devices["excluded"] += len(self.registry.outsiders.keys() - self.state.devices.keys())
        down, up = self.registry.total
        return Facts(
            self.state.round,
            self.job.rounds,
            self.state.phase.value,
            devices,
            {p.value: self.state.tasks.count(p) for p in Progress},
            sum(row["until"] is not None for row in self.quarantine.rows().values()),
            down,
            up,
            self.link.connected,
            {
                "commands": self.executor.waiting,
                "uploads": len(self.uploads.devices()),
                "messages": self.outbox.queued,
            },
        )
