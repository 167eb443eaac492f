"""What the server shows of a job to those who only look."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fedprune.architecture import Architecture
from fedprune.blobs import BlobStore
from fedprune.coordination import State
from fedprune.job import Job
from fedprune_server.fleet.quarantine import Quarantine
from fedprune_server.fleet.roster import Roster


@dataclass(frozen=True)
class JobView:
    """A job; all of it is read, nothing changed.

    Attributes:
        job: Its settings.
        architecture: The global model's.
        state: The coordinator's.
        roster: Its devices.
        quarantine: Who isn't listened to.
        pulled: Leaves of a device's update that are here, and of all.
        connected: Whether the connection to the broker stands.
        weight: Its share of the devices beside other jobs.
        pause: Pauses the job, or lets it go on.
        store: Blobs that nobody has to wait for.
    """

    job: Job
    architecture: Architecture
    state: State
    roster: Roster
    quarantine: Quarantine
    pulled: Callable[[str], tuple[int, int] | None]
    connected: Callable[[], bool]
    weight: Callable[[], float]
    pause: Callable[[bool], None]
    store: BlobStore


class Onlooker:
    """Somebody who looks on while a server works. This one sees nothing."""

    def noticed(self, devices: Collection[str]) -> None:
        """Something of devices has changed, and will be settled.

        Args:
            devices: Their names.
        """

    def round_over(self, job: str, summary: dict[str, Any]) -> None:
        """A round of a job has ended."""

    def turn(self) -> None:
        """The server's loop has come round."""
