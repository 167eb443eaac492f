"""A server and its fleet at one moment, as the alert rules see them.

A running server looks once a second; the doctor makes the same from the state folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedprune.core.lock_wait import LockHolder, lock_holders
from fedprune.releases.rollout import RolloutPhase
from fedprune_server.monitoring.participation import Absence
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.storage.state_folder import LOCK

# Boards may be missing for this long before an alert opens: a router that restarts takes about a minute.
DELAY_S = 60.0

# A round may wait this many seconds, and as long as this many usual rounds, for boards that are offline. A board that
# lost its connection for a moment is back sooner.
_MIN_OFFLINE_WAIT_S, _OFFLINE_WAIT_ROUNDS = 5.0, 3.0


@dataclass(frozen=True, kw_only=True)
class WatchedJob:
    """A job, and what was counted of it while it ran.

    Attributes:
        folder: Its state folder.
        begun: Whether it ever began.
        away: Some of the boards that are not connected and not revoked.
        missed: Deadlines in a row that passed without an update.
        empty: Rounds in a row that closed without a usable update.
        off: Boards whose time or memory exceeds the prediction by far, with the figures in words.
        offline_since: Boards that are offline and for which alone the round waits, and since when they are, in seconds
            since 1970.
        usual_round_s: Seconds of a usual round lately; None if unknown.
    """

    seen: JobSnapshot
    folder: Path
    begun: bool = True
    away: Sequence[str] = ()
    missed: int = 0
    empty: int = 0
    off: Mapping[str, str] = field(default_factory=dict)
    offline_since: Mapping[str, float] = field(default_factory=dict)
    usual_round_s: float | None = None

    @property
    def of_rounds(self) -> str:
        """The round and the number of rounds, as `3 of 20`."""
        return f"{self.seen.round} of {self.seen.rounds or '?'}"

    @property
    def delay_s(self) -> float:
        """Seconds after which missing boards are an alert: well within a deadline."""
        return min(DELAY_S, self.seen.deadline_s / 2)

    @property
    def offline_wait_s(self) -> float:
        """Seconds after which a round that waits for boards that are offline is an alert."""
        if self.usual_round_s is None:
            return self.delay_s
        return min(self.delay_s, max(_MIN_OFFLINE_WAIT_S, _OFFLINE_WAIT_ROUNDS * self.usual_round_s))


@dataclass(frozen=True)
class CertificateDates:
    """A certificate that boards, servers or browsers rely on, valid from `begins` to `ends`, in seconds since 1970.

    Attributes:
        todo: How it is replaced.
        error: Why it can't be read; empty if it can.
    """

    path: str
    begins: float
    ends: float
    todo: str
    error: str = ""


@dataclass(frozen=True)
class RolloutStatus:
    """The latest rollout.

    Attributes:
        why: Why it is paused or stopped.
        failed: Boards on which it failed.
        left: Boards that haven't reported it yet.
        heard_at: When a board last reported something of it, in seconds since 1970.
    """

    release: int
    phase: RolloutPhase
    why: str
    failed: Sequence[str]
    left: Sequence[str]
    heard_at: float


@dataclass(frozen=True)
class SiteFacts:
    """The state of the folder's disk, identity and rollouts.

    Attributes:
        disk: Free bytes, and all, of the state folder's disk; None if unknown.
        waiting: Fingerprints of keys that wait for approval, by board.
        unannounced: Boards that have joined and never announced themselves, and when, in seconds since 1970.
    """

    disk: tuple[int, int] | None = None
    certificates: Sequence[CertificateDates] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)
    rollout: RolloutStatus | None = None
    unannounced: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """A server and its fleet at one moment.

    Attributes:
        here: Boards that are connected and can take part.
        running: Whether a server runs on the folder.
        turned_s: Seconds since the server's loop turned; None if unknown.
        suspended: The server's process, if it was suspended, as by Ctrl-Z.
        waits_for: What the server's loop waits for within a turn, such as a process that has locked the database; empty
            if it turns.
        broker: Why the broker can't be used; empty if it can.
        absences: Boards that no longer take part, and why.
        floods_joins: MQTT client id that floods the requests to join; empty if many do together, None if none does.
        site: What the state folder shows; None if unknown.
        open: Kinds and severities of open alerts.
    """

    folder: Path
    jobs: Sequence[WatchedJob] = ()
    here: int = 0
    running: bool = True
    turned_s: float | None = None
    suspended: LockHolder | None = None
    waits_for: str = ""
    broker: str = ""
    absences: Mapping[str, Absence] = field(default_factory=dict)
    floods_joins: str | None = None
    site: SiteFacts | None = None
    open: frozenset[tuple[str, str]] = frozenset()

    @property
    def open_jobs(self) -> list[WatchedJob]:
        """Jobs that have begun and are not finished."""
        return [job for job in self.jobs if job.begun and not job.seen.finished]


def suspended_server(folder: Path) -> LockHolder | None:
    """The process that has a state folder's lock, if it was suspended; None also where the kernel doesn't tell."""
    holders = lock_holders(folder / LOCK)
    return next((holder for holder in holders if holder.is_stopped and holder.is_certain), None)
