"""A job with everything that a runner needs, and the services for devices that the first runner provides."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.executor.background import CommandExecutor
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.storage import Storage
from fedprune_server.transfer.http import NO_BLOBS, WebBlobs


@dataclass(frozen=True)
class RunnableJob:
    """A job with everything that is needed to run it.

    Attributes:
        frozen: Tensors that the model's author froze.
        keep: Number of the latest global models that stay on the disk, beside the best.
        pulls: Number of devices from which updates are pulled at a time.
        weight: Its share of the devices in comparison with other jobs; 0 to pause it.
        prefix: Begins the log's lines about the job, if its server has several.
    """

    job: Job
    architecture: Architecture
    state: State
    storage: Storage
    store: BlobStore
    worker: CommandExecutor
    frozen: Collection[str] = ()
    keep: int = 3
    pulls: int = 4
    weight: float = 1.0
    prefix: str = ""


@dataclass(frozen=True)
class DeviceServices:
    """A server's services for its devices beside the jobs; the runner of the first job provides them.

    If the fleet has an identity, `members` returns the names of its members: other devices leave a rollout. Without
    `crashes` boards' crash reports are dropped."""

    rollouts: RolloutStore | None = None
    members: Callable[[], Collection[str]] | None = None
    crashes: CrashStore | None = None
    blobs: WebBlobs = NO_BLOBS


NO_SERVICES = DeviceServices()
