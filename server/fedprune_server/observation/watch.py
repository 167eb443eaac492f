"""What a daemon tells those who watch it; it waits for none of them, and works alike without any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.state import Progress
from fedprune.job import Job
from fedprune_server.fleet.quarantine import Quarantine
from fedprune_server.fleet.roster import Roster

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
    job: Job, state: State, roster: Roster, quarantine: Quarantine, connected: bool, queues: Mapping[str, int]
) -> Facts:
    """A job's figures; looks at every device.

    Args:
        job: The job.
        state: The coordinator's state.
        roster: The devices.
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
    devices["excluded"] += len(roster.outsiders.keys() - state.devices.keys())
    traffic = roster.traffic.values()
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


class Watch:
    """Looks on, and says nothing. Every method is called by the daemon's loop, and must be quick.

    Attributes:
        trace_id: What lines of the log are marked with; None for nothing.
    """

    trace_id: str | None = None

    def event(self, event: on.Event, now: float) -> None:
        """The coordinator was told of an event."""

    def command(self, command: do.Command, now: float) -> None:
        """The coordinator's command is about to be carried out."""

    def round_over(self, summary: Mapping[str, Any], now: float) -> None:
        """A round has been finished."""

    def saved(self, seconds: float) -> None:
        """The database took so long to save a turn's events."""

    def turned(self, seconds: float, facts: Callable[[], Facts]) -> None:
        """A turn of the loop is over, which took so long beside waiting."""

    def close(self) -> None:
        """The daemon ends."""


class Watches(Watch):
    """Several at once.

    Args:
        watches: They.
    """

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._all = tuple(watches)

    @property
    def trace_id(self) -> str | None:  # type: ignore[override]
        """The first that there is."""
        return next((w.trace_id for w in self._all if w.trace_id is not None), None)

    def event(self, event: on.Event, now: float) -> None:
        """Tell all."""
        for watch in self._all:
            watch.event(event, now)

    def command(self, command: do.Command, now: float) -> None:
        """Tell all."""
        for watch in self._all:
            watch.command(command, now)

    def round_over(self, summary: Mapping[str, Any], now: float) -> None:
        """Tell all."""
        for watch in self._all:
            watch.round_over(summary, now)

    def saved(self, seconds: float) -> None:
        """Tell all."""
        for watch in self._all:
            watch.saved(seconds)

    def turned(self, seconds: float, facts: Callable[[], Facts]) -> None:
        """Tell all."""
        for watch in self._all:
            watch.turned(seconds, facts)

    def close(self) -> None:
        """Tell all."""
        for watch in self._all:
            watch.close()
