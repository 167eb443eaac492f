"""A server and its fleet at one moment, as the alert rules see them.

A running server looks once a second; the doctor makes the same from the state folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedprune.core.lock_holders import LockHolder, lock_holders
from fedprune.core.text import round_text
from fedprune.releases.rollout import RolloutPhase
from fedprune_server.monitoring.participation import Absence
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.storage.folder_lock import LOCK_FILE

# Boards may be missing for this long before an alert opens: a router that restarts takes about a minute.
MAX_ALERT_DELAY_S = 60.0

# A round may wait this many seconds, and as long as this many usual rounds, for boards that are offline. A board that
# lost its connection for a moment is back sooner.
_MIN_OFFLINE_WAIT_S, _OFFLINE_WAIT_ROUNDS = 5.0, 3.0


@dataclass(frozen=True, kw_only=True)
class WatchedJob:
    """A job with its state folder, and the counts of its troubles while it ran.

    Attributes:
        has_begun: Whether it ever began.
        away_boards: Some of the boards that are not connected and not revoked.
        excluded_boards: Some of the boards that are connected and excluded, with the reason, while no other board is
            there.
        missed_deadlines: Deadlines in a row that passed without an update.
        empty_rounds: Rounds in a row that closed without a usable update.
        prediction_excesses: Boards whose time or memory exceeds the prediction by far, with the figures in words.
        offline_since: When boards went offline, in seconds since 1970, if the round waits only for these.
        usual_round_s: Seconds of a usual round lately; None if unknown.
    """

    snapshot: JobSnapshot
    folder: Path
    has_begun: bool = True
    away_boards: Sequence[str] = ()
    excluded_boards: Mapping[str, str] = field(default_factory=dict)
    missed_deadlines: int = 0
    empty_rounds: int = 0
    prediction_excesses: Mapping[str, str] = field(default_factory=dict)
    offline_since: Mapping[str, float] = field(default_factory=dict)
    usual_round_s: float | None = None

    @property
    def round_text(self) -> str:
        """The round and the number of rounds, as `3 of 20`."""
        number, limit = self.snapshot.round, self.snapshot.rounds
        return round_text(number, limit) if limit else f"{number:,} of ?"

    @property
    def delay_s(self) -> float:
        """Seconds after which missing boards are an alert: well within a deadline."""
        return min(MAX_ALERT_DELAY_S, self.snapshot.deadline_s / 2)

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
        advice: How it is replaced.
        error: Why it can't be read; empty if it can.
    """

    path: str
    begins: float
    ends: float
    advice: str
    error: str = ""


@dataclass(frozen=True)
class RolloutStatus:
    """The latest rollout.

    Attributes:
        reason: Why it is paused or stopped.
        failed_boards: Boards on which it failed.
        pending_boards: Boards that haven't reported it yet.
        release_boards: Boards that have the release, or may still install it.
        last_report_at: When a board last reported something of it, in seconds since 1970.
    """

    release: int
    phase: RolloutPhase
    reason: str
    failed_boards: Sequence[str]
    pending_boards: Sequence[str]
    release_boards: Sequence[str]
    last_report_at: float


@dataclass(frozen=True)
class SiteFacts:
    """The state of the folder's disk, identity and rollouts.

    Attributes:
        disk: Free bytes, and all, of the state folder's disk; None if unknown.
        waiting_keys: Fingerprints of keys that wait for approval, by board.
        unannounced_boards: Boards that have joined and never announced themselves, and when, in seconds since 1970.
    """

    disk: tuple[int, int] | None = None
    certificates: Sequence[CertificateDates] = ()
    waiting_keys: Mapping[str, str] = field(default_factory=dict)
    rollout: RolloutStatus | None = None
    unannounced_boards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """A server and its fleet at one moment.

    Attributes:
        able_boards: Boards that are connected and can take part.
        is_running: Whether a server runs on the folder.
        since_turn_s: Seconds since the server's loop turned; None if unknown.
        suspended_process: The server's process, if it was suspended, as by Ctrl-Z.
        waits_for: What the server's loop waits for within a turn, such as a process that has locked the database; empty
            if it turns.
        broker_problem: Why the broker can't be used; empty if it can.
        absences: Boards that no longer take part, and why.
        flooding_client: MQTT client id that floods the requests to join; empty if many do together, None if none does.
        site: What the state folder shows; None if unknown.
        open_severities: Kinds and severities of open alerts.
    """

    folder: Path
    jobs: Sequence[WatchedJob] = ()
    able_boards: int = 0
    is_running: bool = True
    since_turn_s: float | None = None
    suspended_process: LockHolder | None = None
    waits_for: str = ""
    broker_problem: str = ""
    absences: Mapping[str, Absence] = field(default_factory=dict)
    flooding_client: str | None = None
    site: SiteFacts | None = None
    open_severities: frozenset[tuple[str, str]] = frozenset()

    @property
    def open_jobs(self) -> list[WatchedJob]:
        """Jobs that have begun and are not finished."""
        return [job for job in self.jobs if job.has_begun and not job.snapshot.is_finished]


def suspended_server(folder: Path) -> LockHolder | None:
    """The process that has a state folder's lock, if it was suspended; None also where the kernel doesn't tell."""
    holders = lock_holders(folder / LOCK_FILE)
    return next((holder for holder in holders if holder.is_stopped and holder.is_certain), None)
