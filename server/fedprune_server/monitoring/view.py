"""What there is to see of a job for those who only look: what the server knows itself, a table of it, and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.monitoring.facts import Facts, facts_of
from fedprune_server.terminal.table import Snapshot

OFFLINE = "offline"
"""What the table says of a device that isn't there."""


@dataclass(frozen=True)
class JobView:
    """A job; all of it is read, nothing changed.

    Attributes:
        job: Its settings.
        architecture: The global model's.
        state: The coordinator's.
        registry: Its devices.
        quarantine: Who isn't listened to.
        pulled: Leaves of a device's update that are here, and of all.
        connected: Whether the connection to the broker stands.
        weight: Its share of the devices beside other jobs.
        pause: Pauses the job, or lets it go on.
        store: Blobs that nobody has to wait for.
        queues: How much waits, by queue.
        clock: Seconds since 1970.
        away: What is said of a device that isn't there.
    """

    job: Job
    architecture: Architecture
    state: State
    registry: DeviceRegistry
    quarantine: Quarantine
    pulled: Callable[[str], tuple[int, int] | None]
    connected: Callable[[], bool]
    weight: Callable[[], float]
    pause: Callable[[bool], None]
    store: BlobStore
    queues: Callable[[], Mapping[str, int]]
    clock: Callable[[], float]
    away: str = OFFLINE

    def snapshot(self) -> Snapshot:
        """The job as people see it."""
        pulled = {n: p for n in self.state.tasks if (p := self.pulled(n)) is not None}
        found = self.registry.snapshot(self.clock(), self.connected(), pulled)
        if self.away == OFFLINE:
            return found
        return replace(found, rows=tuple(replace(r, state=self.away) if r.state == OFFLINE else r for r in found.rows))

    def facts(self) -> Facts:
        """The job as figures."""
        return facts_of(self.job, self.state, self.registry, self.quarantine, self.connected(), self.queues())
