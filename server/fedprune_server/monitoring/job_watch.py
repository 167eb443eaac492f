"""Counts a running job's troubles for the alert rules: missed deadlines, empty rounds, wrong predictions."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from types import MappingProxyType

from fedprune.coordination import Phase
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.state import Progress
from fedprune_server.monitoring.alerts import MAX_NAMES_SHOWN
from fedprune_server.monitoring.participation import Participation
from fedprune_server.monitoring.situation import WatchedJob
from fedprune_server.observation.observer import RoundEnded, TurnEvent, handle_each
from fedprune_server.observation.snapshot import JobSnapshot

# Enough that seven rounds that stall change nothing, and few enough to follow a fleet that becomes slower.
_RECENT_ROUNDS = 15

# Ticks come at a deadline, which floats may put a little before it.
_ROUNDING_S = 1e-3

# The ratio of measurement to prediction that is an alert. Time may double while another program runs on a board; memory
# doesn't depend on other programs, and a board that needs more than it has is killed.
_EXCESS_LIMITS = {"step_seconds": 2.0, "latency_seconds": 2.0, "peak_memory_bytes": 1.25}


class RoundTimes:
    """Seconds from the end of each round to the next one's."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._seconds: deque[float] = deque(maxlen=_RECENT_ROUNDS)

    def note_end(self, number: int, now: float) -> None:
        """Note the end of a round. The first one gives no time, because its beginning wasn't seen."""
        if self._last is not None and number > self._last[0] and now >= self._last[1]:  # unless a clock was set back
            self._seconds.append((now - self._last[1]) / (number - self._last[0]))
        self._last = number, now

    def usual_s(self) -> float | None:
        """Seconds of a usual round; None before two have ended.

        The median, because one round that waits for its deadline takes as long as hundreds of others.
        """
        return median(self._seconds) if self._seconds else None


class JobWatch:
    """Counts the events of one job, and shows the counts to the alert rules as a `WatchedJob`."""

    def __init__(self, snapshot: JobSnapshot, folder: Path, participation: Participation) -> None:
        self._snapshot, self._folder, self.participation = snapshot, folder, participation
        self._missed_deadlines = self._updates_at_close = 0
        self._empty_rounds = 0  # since an update counted; also closes that reject all, and offers that all refuse
        self.rounds_ended = 0  # since the server's start
        self._offered_at: float | None = None  # when the first offer since the last counted update was sent
        self._round_times = RoundTimes()
        self._excesses: Mapping[str, str] = prediction_excesses(snapshot)

    def observe(self, snapshot: JobSnapshot, events: Sequence[TurnEvent]) -> None:
        self._snapshot = snapshot
        self.participation.observe(snapshot, events)
        handle_each(events, lambda event: self._count(event.payload, event.happened_at))
        # Once for all events of a turn of the server's loop: the snapshot is of its end.
        has_refusals = any(isinstance(event.payload, (on.OfferRefused, on.UpdateRejected)) for event in events)
        if has_refusals and snapshot.phase is Phase.TRAINING and not snapshot.is_asynchronous:
            refused = snapshot.parts_by_progress.get(Progress.REFUSED, 0)
            self._empty_rounds += int(refused > 0 and refused == sum(snapshot.parts_by_progress.values()))

    def _count(self, event: object, now: float) -> None:
        snapshot = self._snapshot
        match event:
            case do.Close():
                self._updates_at_close = len(event.contributions)
            case do.SendOffer() if self._offered_at is None:
                self._offered_at = now
            case on.Folded() | on.Paused():
                self._missed_deadlines = 0
                self._offered_at = now if snapshot.is_asynchronous else None  # others are being asked meanwhile
            case on.Closed() if self._updates_at_close and len(event.rejected) >= self._updates_at_close:
                self._empty_rounds += 1
            case on.Ticked() if self._offered_at is not None:
                missed = int((now - self._offered_at + _ROUNDING_S) // snapshot.deadline_s)
                self._missed_deadlines = max(self._missed_deadlines, missed)
            case RoundEnded(summary):
                has_counted = any(p["progress"] == Progress.FOLDED.value for p in summary["devices"].values())
                self._empty_rounds = 0 if has_counted else self._empty_rounds + 1
                self.rounds_ended += 1
                self._round_times.note_end(summary["round"], now)
                self._excesses = prediction_excesses(snapshot, self._excesses)

    def watched_job(self) -> WatchedJob:
        """The job as the rules see it."""
        self.participation.update()
        snapshot, away_since = self._snapshot, self.participation.away_since
        needs_boards = snapshot.phase is Phase.WAITING or not snapshot.able_devices
        missing_boards = (
            (name for name in away_since if name not in snapshot.revoked_devices) if needs_boards else iter(())
        )
        # Some of the boards that are connected, but excluded, with the reason.
        names = (name for name in snapshot.fleet.connected_devices if name in snapshot.devices)
        exclusions = ((name, reason) for name in names if (reason := snapshot.devices[name].excluded))
        return WatchedJob(
            snapshot=snapshot,
            folder=self._folder,
            away_boards=tuple(islice(missing_boards, MAX_NAMES_SHOWN + 1)),
            excluded_boards=dict(islice(exclusions, 0 if snapshot.able_devices else MAX_NAMES_SHOWN + 1)),
            missed_deadlines=self._missed_deadlines,
            empty_rounds=self._empty_rounds,
            prediction_excesses=self._excesses,
            offline_since=self.participation.offline_since(),
            usual_round_s=self._round_times.usual_s(),
        )


def prediction_excesses(snapshot: JobSnapshot, earlier: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Boards whose time or memory exceeded the prediction by far in their latest round, with the figures of `status`.

    Boards in `earlier`, the result after the previous round, stay until half of the excess is gone.
    """
    excesses = {name: text for name, text in earlier.items() if name in snapshot.devices}
    for name, comparison in snapshot.comparisons.items():
        excesses.pop(name, None)
        limits = {m: (1.0 + limit) / 2 if name in earlier else limit for m, limit in _EXCESS_LIMITS.items()}
        pairs = comparison.corrected.items()
        if exceeded := [m for m, (expected, taken) in pairs if expected and taken and taken > limits[m] * expected]:
            excesses[name] = comparison.text(exceeded)
    return excesses
