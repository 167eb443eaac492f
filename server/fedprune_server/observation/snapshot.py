"""One moment of a job, for everybody who observes it: display, metrics, alerts, doctor, console, trackers, traces.

The engine makes a snapshot after each turn (one transaction of the coordinator). Figures that need a pass over all
devices are `LazyMapping`s, so that a turn costs the same with ten boards and with ten thousand. An observer reads them
within `observe`: they show the moment of the first read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from fedprune.coordination import Phase
from fedprune.jobs.state import Progress
from fedprune_server.devices.plan_vs_actual import LatestComparison

T = TypeVar("T")

# Activities of a device that isn't connected, and of one that is connected and works for another job, or for none. They
# are words for people: no rule compares them with anything else.
OFFLINE, AT_OTHER_JOB = "offline", "not at this job"

# A part with one of these is unfinished: the round waits for it, until its deadline.
AWAITED_PROGRESS = (Progress.QUEUED, Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)


class LazyMapping(Mapping[str, T]):
    """A mapping that is computed when somebody reads it for the first time."""

    def __init__(self, make: Callable[[], Mapping[str, T]]) -> None:
        self._make = make

    @cached_property
    def _entries(self) -> Mapping[str, T]:
        return self._make()

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSnapshot:
    """A device of a job.

    Attributes:
        takes_part: Whether the job has planned for it; False if only bytes of it were counted.
        online: Whether it is connected and at this job.
        connected: Whether it is connected, at whatever job.
        density: Kept share of its channels; None before it is planned for.
        parameters: Numbers in its model; 0 before it is planned for.
        bytes_down: Payload bytes to it so far.
        bytes_up: Payload bytes from it so far.
        seconds: From its last offer to the arrival of its update, None before the first.
        metrics: Scores of the model that it serves, on its own test samples, as last reported.
        activity: Its activity, in words for people.
        part_progress: The progress of its part in the round, as one word; empty if nothing is awaited of it.
        excluded: The reason why it takes no part; empty if it does.
        excluded_by: The kind of the failure behind that; empty if there was none.
        last_counted_round: The round of the offer behind its last counted update; 0 before the first.
        software: Names and versions of its software, as it reports them.
        last_message_at: When its latest message came, in seconds since 1970; None before the first since the server's
            start.
    """

    name: str
    takes_part: bool = True
    online: bool = True
    connected: bool = True
    profile: str = "?"
    density: float | None = None
    parameters: int = 0
    samples: int | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    activity: str = "ready"
    part_progress: str = ""
    excluded: str = ""
    excluded_by: str = ""
    last_counted_round: int = 0
    software: str = ""
    temperature_c: float | None = None
    last_message_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class FleetSnapshot:
    """The part of a snapshot that a server's jobs share.

    Attributes:
        connected_devices: The boards that are connected, at whatever job.
        job_of_device: The job that has a board, by board; free boards are left out.
        quarantines: The end of each quarantine, in seconds since 1970, and its reason, by board.
        flooding_client: MQTT client id that floods the requests to join; empty if many do together, None if none does.
    """

    broker_connected: bool = True
    connected_devices: Collection[str] = ()
    job_of_device: Mapping[str, str] = field(default_factory=dict)
    quarantines: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    flooding_client: str | None = None
    has_several_jobs: bool = False


@dataclass(frozen=True, kw_only=True)
class JobSnapshot:
    """A job at one moment. Times are in seconds since 1970.

    Attributes:
        judged_by: The metric by which its models are judged.
        is_asynchronous: Whether rounds end without waiting for those who were asked in them.
        closes_early: Whether rounds close before all devices are done, on purpose.
        min_devices: Boards with which a round begins.
        deadline_s: Seconds that a round waits for updates.
        round: The current round, from 1; 0 before the first.
        closes_at: When the current round stops waiting; None without a deadline.
        history: One summary per finished round; the latest have their devices' parts.
        parts_by_progress: Number of the round's parts by progress.
        parameters: Numbers in the whole model.
        bytes_down: Payload bytes to all devices, over all starts of the server.
        bytes_up: The same from them.
        queues: Number of items that wait in the server, by queue.
        able_devices: How many could take part in a round now.
        known_devices: How many ever announced themselves.
        devices: Devices that announced themselves, by name, and those of which only bytes were counted.
        devices_with_traffic: Devices that have sent or were sent something since the job was saved.
        device_states: How many devices are `working`, `idle`, `excluded`, `offline` or `revoked`.
        awaited_devices: Devices whose part is under way, and when the round goes on without each; None if that is
            unknown.
        unplanned_devices: Devices that can't be planned for, or can't start, with the reason.
        revoked_devices: Devices that are no longer members; a look at it may read the database.
        cloned_devices: Names that seem to be two boards, and the reason.
        undelivered_devices: Devices whose messages the broker seems to drop, in words.
        silent_devices: Seconds since the offers to devices that should have answered them long ago.
        crashes: How devices' programs ended last, until an update of theirs arrives.
        comparisons: Predictions and measurements of the devices that counted in the latest round.
    """

    name: str
    strategy: str = ""
    judged_by: str = "accuracy"
    is_asynchronous: bool = False
    closes_early: bool = False
    rounds: int = 0
    min_devices: int = 1
    deadline_s: float = 600.0
    round: int = 0
    phase: Phase = Phase.WAITING
    is_paused: bool = False
    model: str = ""
    now: float = 0.0
    closes_at: float | None = None
    history: Sequence[Mapping[str, Any]] = ()
    parts_by_progress: Mapping[Progress, int] = field(default_factory=dict)
    parameters: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    queues: Mapping[str, int] = field(default_factory=dict)
    able_devices: int = 0
    known_devices: int = 0
    devices: Mapping[str, DeviceSnapshot] = field(default_factory=dict)
    devices_with_traffic: Collection[str] = ()
    device_states: Mapping[str, int] = field(default_factory=dict)
    awaited_devices: Mapping[str, float | None] = field(default_factory=dict)
    unplanned_devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    revoked_devices: Collection[str] = ()
    cloned_devices: Mapping[str, str] = field(default_factory=dict)
    undelivered_devices: Mapping[str, str] = field(default_factory=dict)
    silent_devices: Mapping[str, float] = field(default_factory=dict)
    crashes: Mapping[str, str] = field(default_factory=dict)
    comparisons: Mapping[str, LatestComparison] = field(default_factory=dict)
    fleet: FleetSnapshot = field(default_factory=FleetSnapshot)

    @property
    def is_finished(self) -> bool:
        return self.phase is Phase.FINISHED

    @property
    def metrics(self) -> Mapping[str, float]:
        """Measurements of the global model after the latest round."""
        return self.history[-1]["metrics"] if self.history else {}
