"""A job at one moment, as figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.devices.registry import DeviceRegistry

_UNDER_WAY = (Progress.QUEUED, Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)
"""Progress of parts that something is still awaited of."""


@dataclass(frozen=True)
class Facts:
    """A job at one moment, as figures.

    Attributes:
        round: The current round.
        rounds: Rounds in all.
        phase: Where the round stands.
        devices: Devices by state: `working`, `idle`, `excluded` or `offline`.
        tasks: Parts of the round by how far they are.
        quarantined: Devices that aren't listened to.
        bytes_down: Payload bytes to all devices, over all starts.
        bytes_up: The same from them.
        connected: Whether the broker is there.
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


def facts_of(
    job: Job, state: State, registry: DeviceRegistry, quarantine: Quarantine, connected: bool, queues: Mapping[str, int]
) -> Facts:
    """A job's figures; looks at every device.

    Args:
        job: The job.
        state: The coordinator's state.
        registry: The devices.
        quarantine: Says who isn't heard.
        connected: Whether the broker is there.
        queues: What waits, by queue.
    """
    devices: Counter[str] = Counter()
    for name, device in state.devices.items():
        task = state.tasks.get(name)
        works = task is not None and task.progress in _UNDER_WAY and state.awaits(task)
        online = "working" if works else "idle"
        devices["excluded" if device.excluded else online if device.online else "offline"] += 1
    devices["excluded"] += len(registry.outsiders.keys() - state.devices.keys())
    traffic = registry.traffic.values()
    return Facts(
        state.round,
        job.rounds,
        state.phase.value,
        devices,
        {p.value: state.tasks.count(p) for p in Progress},
        sum(row["until"] is not None for row in quarantine.rows().values()),
        sum(down for down, _ in traffic),
        sum(up for _, up in traffic),
        connected,
        queues,
    )
