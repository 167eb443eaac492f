"""Alert rules: from one snapshot of a server and its fleet to the alerts that it justifies.

The server's log, its console, its metrics, its notifications and `fedprune-server doctor` all show what
`evaluate_alerts` returns.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fedprune.coordination import Phase
from fedprune.core.text import quantity, sentences, some
from fedprune.releases.rollout import RolloutPhase
from fedprune.wire.lost_pieces import broker_drops
from fedprune_server.devices.quarantine import CROWDED_S
from fedprune_server.monitoring import participation
from fedprune_server.monitoring.participation import (
    AWAY,
    CLONED,
    EXCLUDED,
    FAILING,
    QUARANTINE,
    UNDELIVERED,
    Absence,
    format_minute,
)
from fedprune_server.monitoring.snapshot import JobStatus, RolloutStatus, SiteFacts, Snapshot

CRITICAL, WARNING, INFO = "critical", "warning", "info"
SEVERITIES = (INFO, WARNING, CRITICAL)
"""From the least severe to the most severe."""

ALERT_SEVERITIES: Mapping[str, tuple[str, ...]] = {
    "server-not-running": (CRITICAL,),
    "server-hangs": (CRITICAL,),
    "database-waits": (CRITICAL,),
    "broker": (CRITICAL,),
    "no-devices": (CRITICAL, WARNING),
    "too-few-devices": (WARNING,),
    "no-progress": (CRITICAL,),
    "round-waits": (WARNING,),
    "disk": (CRITICAL, WARNING),
    "certificate": (CRITICAL, WARNING),
    QUARANTINE: (WARNING,),
    CLONED: (WARNING,),
    EXCLUDED: (WARNING,),
    UNDELIVERED: (WARNING,),
    FAILING: (WARNING,),
    AWAY: (WARNING,),
    "joins-flooded": (WARNING,),
    "devices-wait": (WARNING,),
    "device-unheard": (WARNING, INFO),
    "rollout": (WARNING, INFO),
    "rollout-paused": (INFO,),
    "prediction-off": (INFO,),
}
"""The kinds of alerts with the severities that each can have."""

HANG_THRESHOLD_S = 60.0
"""A server's loop that has not turned for this long hangs."""

MAX_ALERTS_OF_KIND = 500
"""Alerts of one kind that are shown at a time."""

MAX_NAMES_SHOWN = 5
"""Names that a text lists."""

BOARD_LOG_COMMAND = "journalctl -u fedprune -n 50"
"""Shows a board's log, on the board."""

_ANNOUNCEMENT_TIMEOUT_S, _MEASUREMENT_TIMEOUT_S = 25.0, 120.0
"""Seconds after which a board that has joined should be heard: one that doesn't measure itself first, and any."""

_CERTIFICATE_NOTICE_S = 30 * 24 * 3600.0
"""A month before its end a certificate is an alert: within that time somebody will be there who replaces it."""

_ROLLOUT_SILENCE_S = 6 * 3600.0
"""A board installs a release within minutes: after this long without news the others are off, or can't be reached."""

_DISK_WARNING_LIMIT, _DISK_CRITICAL_LIMIT = (0.1, 10e9), (0.03, 2e9)
"""A disk is short of room below this share of it, and below this many bytes: a tenth of a large disk is plenty."""

_MIN_FREE_BYTES = 256 * 2**20
"""Less is critical on a disk of any size: of a small one, 3 % may be less than a round writes."""

_DISK_RECOVERY_FACTOR = 1.2
"""An open alert about the disk stays until this many times the limit is free, so that it doesn't open and close with
each file that is written and deleted."""

_BROKER_DELAY_S = 15.0
"""The longest that the broker may be away before an alert opens."""


MISSING_BOARDS = ("no-devices", "too-few-devices")
"""Kinds of alerts about boards that are missing."""


@dataclass(frozen=True)
class Alert:
    """A problem that an operator has to know of.

    Attributes:
        since: When it began, in seconds since 1970.
        why: What it leads to.
        todo: What to do about it, with a command where there is one.
        job: The job that it is about; None for the whole server.
        device: The board that it is about; None for no single one.
        subject: The file or server that it is about; empty for none.
        delay_s: Seconds for which it has to hold before it opens, and to be gone before it closes.
    """

    kind: str
    severity: str
    since: float
    what: str
    why: str
    todo: str
    job: str | None = None
    device: str | None = None
    subject: str = ""
    delay_s: float = 0.0

    @property
    def key(self) -> str:
        """Kind and subject, which identify the alert whatever its severity."""
        return ":".join(part for part in (self.kind, self.job, self.device or self.subject) if part)

    @property
    def text(self) -> str:
        """What is wrong, and what to do."""
        return sentences(self.what, f"To do: {self.todo}")


def evaluate_alerts(seen: Snapshot, now: float) -> list[Alert]:
    """All alerts that a snapshot justifies at a time in seconds since 1970."""
    alerts = [*_server_alerts(seen, now)]
    for job in seen.jobs:
        if not job.finished and job.begun:
            alerts += _board_alerts(seen, job, now)
            alerts += _progress_alerts(seen, job, now)
            alerts += _stall_alerts(seen, job)
            alerts += _prediction_alerts(job, now)
    if seen.site is not None:
        alerts += _disk_alerts(seen, seen.site, now)
        alerts += _certificate_alerts(seen.site, now)
        alerts += _approval_alerts(seen, seen.site, now)
        alerts += _unheard_board_alerts(seen, seen.site, now)
        alerts += _rollout_alerts(seen, seen.site.rollout, now)
    alerts += _absence_alerts(seen)
    if seen.floods_joins is not None:
        alerts.append(_join_flood_alert(seen.floods_joins, now))
    return alerts


def command(*words: object) -> str:
    """A `fedprune-server` command line, quoted for a shell."""
    return f"fedprune-server {shlex.join(str(w) for w in words)}"


def restart_advice(*words: object) -> str:
    """What to do for another setting of `fedprune-server run` while a server runs."""
    return f"stop the server, then {command('run', *words)}"


def state_args(folder: Path) -> tuple[str, str]:
    return "--state", str(folder)


def _server_alerts(seen: Snapshot, now: float) -> Iterator[Alert]:
    if seen.running:
        if seen.suspended is not None:
            yield Alert(
                "server-hangs", CRITICAL, now - (seen.turned_s or 0.0),
                f"the server was suspended (Ctrl-Z, SIGSTOP): {seen.suspended.name}",
                "no message of a board is read meanwhile; nothing is lost",
                f"continue it: `fg` in its terminal, or `kill -CONT {seen.suspended.pid}`",
            )  # fmt: skip
        elif seen.turned_s is not None and seen.turned_s > HANG_THRESHOLD_S:
            yield Alert(
                "server-hangs", CRITICAL, now - seen.turned_s,
                f"the server's loop has not turned for {seen.turned_s:.0f} s",
                "no message of a board is read meanwhile",
                "see the server's log and the load of its disk; stop it and start it again: it continues where it was",
            )  # fmt: skip
        elif seen.waits_for:
            yield Alert(
                "database-waits", CRITICAL, now, f"the server waits for its database: {seen.waits_for}",
                "no message of a board is read meanwhile; nothing is lost, and the server goes on by itself",
                "continue the process that is named, or end it (docs/runbook.md#the-database-is-gone-or-locked); a "
                "database on another machine: see that it runs and can be reached",
            )  # fmt: skip
        elif seen.broker:
            delay = min([_BROKER_DELAY_S, *(j.deadline_s / 2 for j in seen.jobs)])
            yield Alert(
                "broker", CRITICAL, now, seen.broker, "server and boards meet there; without it nothing moves",
                "see that the broker runs, that its address is right (--broker), and the firewall (docs/runbook.md)",
                delay_s=delay,
            )  # fmt: skip
        return
    for job in seen.jobs:
        if not job.begun:
            yield Alert(
                "server-not-running", CRITICAL, now, f"no job has begun in {job.folder}",
                "a server that couldn't start, or was never started, gives boards nothing to do",
                f"{command('run', *state_args(job.folder), '--model', 'MODEL')}; its messages at the start tell what "
                "it lacks",
                job=job.name,
            )  # fmt: skip
        elif not job.finished:
            yield Alert(
                "server-not-running", CRITICAL, now,
                f"no server runs on {job.folder}, and job {job.name} is in round {job.round} of {job.rounds or '?'}",
                "boards wait for it, and train nothing meanwhile",
                command("run", *state_args(job.folder)), job=job.name,
            )  # fmt: skip


def _board_alerts(seen: Snapshot, job: JobStatus, now: float) -> Iterator[Alert]:
    if seen.broker:
        return  # they are missing for the reason that its own alert has
    if not job.known and not seen.here:
        claim = f"let a board in: {command('claim', '--device', 'NAME', *state_args(seen.folder))}; then on the board: "
        yield Alert(
            "no-devices", WARNING, now, f"no device has announced itself to job {job.name} yet",
            "a round can't begin without boards",
            f"{claim}"
            "fedprune-device join, and fedprune-device run. A board that has joined measures itself first; its log "
            "has the reason if it doesn't connect. If it says that it is connected, "
            f"{broker_drops('what it sends')} (docs/runbook.md#the-broker-drops-messages)",
            job=job.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    if not seen.running or job.paused or (seen.here and (job.phase is not Phase.WAITING or seen.here >= job.needed)):
        return
    away = f"; away: {some(job.away)}" if job.away else ""
    revoked = f"; revoked: {some(job.revoked)}" if job.revoked else ""
    readmission = ""
    if job.revoked:
        name = job.revoked[0] if len(job.revoked) == 1 else "NAME"
        readmission = f"; for {some(job.revoked)}: {command('devices', 'replace', name, *state_args(seen.folder))}"
    if not seen.here:
        yield Alert(
            "no-devices", CRITICAL, now,
            f"no board that can take part is connected, and job {job.name} is in round {job.round} of "
            f"{job.rounds or '?'}{away}{revoked}",
            "nothing is trained until boards come back",
            "see that boards have power and network, and that the broker's port is open; "
            f"{command('crashes', *state_args(seen.folder))} shows programs that ended{readmission}",
            job=job.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    more = f"let more boards in ({command('claim', '--device', 'NAME', *state_args(seen.folder))})"
    if job.away:
        more = (
            f"start the boards that are away ({command('crashes', *state_args(seen.folder))} shows programs that ended)"
        )
    yield Alert(
        "too-few-devices", WARNING, now,
        f"job {job.name} waits for {quantity(job.needed, 'device')}, and {seen.here} can take part now{away}{revoked}",
        f"a round begins with {quantity(job.needed, 'device')}",
        f"{more}, or begin with fewer: {restart_advice(*state_args(job.folder), '--devices', seen.here)}{readmission}",
        job=job.name, delay_s=job.delay_s,
    )  # fmt: skip


def _progress_alerts(seen: Snapshot, job: JobStatus, now: float) -> Iterator[Alert]:
    if job.paused or not (job.missed or job.empty):
        return
    missed = f"{quantity(job.missed, 'deadline')} of {job.deadline_s:g} s passed without an update"
    if not job.missed:
        missed = f"{quantity(job.empty, 'round')} closed without a usable update"
    todo = (
        f"see each board's reason: {command('status', *state_args(job.folder))}, and "
        f"{command('crashes', *state_args(job.folder))}; if boards need longer: "
        f"{restart_advice(*state_args(job.folder), '--deadline', f'{2 * job.deadline_s:g}')}"
    )
    if undelivered := [name for name, absence in seen.absences.items() if absence.kind == UNDELIVERED]:
        todo = (
            f"a longer deadline won't help: see the alert about {some(undelivered)}, of which the broker drops messages"
        )
    yield Alert(
        "no-progress", CRITICAL, now,
        f"job {job.name} makes no progress in round {job.round} of {job.rounds or '?'}: {missed}",
        "the model doesn't move", todo, job=job.name,
    )  # fmt: skip


def _stall_alerts(seen: Snapshot, job: JobStatus) -> Iterator[Alert]:
    """A round that waits for boards that are offline, and for nothing else."""
    # Where no board is connected an alert of that has the reason.
    if not job.awaited or job.paused or seen.broker or not seen.here:
        return
    since, until = min(job.awaited.values()), ""
    if job.closes_at is not None:
        whom = "it" if len(job.awaited) == 1 else "them"
        until = f"; the round goes on without {whom} at {format_minute(job.closes_at)} (deadline)"
    yield Alert(
        "round-waits", WARNING, since,
        f"round {job.round} of job {job.name} waits for {some(list(job.awaited))}, offline since "
        f"{format_minute(since)}{until}",
        "nothing else of the round is under way: all other boards wait, too",
        "see that it has power and network: a board that comes back resumes its part; or start with a shorter "
        "--deadline (docs/rounds.md#slow-and-unreliable-boards)",
        job=job.name, delay_s=job.offline_wait_s,
    )  # fmt: skip


def _prediction_alerts(job: JobStatus, now: float) -> Iterator[Alert]:
    if job.off:
        which = some([f"{name} {text}" for name, text in job.off.items()], "; ")
        yield Alert(
            "prediction-off", INFO, now,
            f"{quantity(len(job.off), 'board')} of job {job.name} needed far more than planned: {which}",
            "a board that needs more memory than planned may be killed, and one that needs more time may be late",
            f"compare with {command('status', *state_args(job.folder))}, which shows the predictions before the first "
            "round, too; see what else runs on the board, or give it less (docs/planner.md)",
            job=job.name,
        )  # fmt: skip


def _disk_alerts(seen: Snapshot, site: SiteFacts, now: float) -> Iterator[Alert]:
    if site.disk is None:
        return
    free, total = site.disk

    def is_short(severity: str, limit: tuple[float, float], min_bytes: float = 0.0) -> bool:
        as_severe = SEVERITIES[SEVERITIES.index(severity) :]
        factor = _DISK_RECOVERY_FACTOR if any(("disk", s) in seen.open for s in as_severe) else 1.0
        share, max_bytes = limit
        return free < factor * max(min_bytes, min(share * total, max_bytes))

    full = is_short(CRITICAL, _DISK_CRITICAL_LIMIT, _MIN_FREE_BYTES)
    if full or is_short(WARNING, _DISK_WARNING_LIMIT):
        scale, unit = (1e9, "GB") if total >= 10e9 else (1e6, "MB")
        yield Alert(
            "disk", CRITICAL if full else WARNING, now,
            f"the disk of {seen.folder} has {free / scale:.2f} of {total / scale:.0f} {unit} left",
            "a server without room ends (exit code 30); nothing is lost, but nothing goes on",
            f"make room; {command('check', *state_args(seen.folder), '--repair')} deletes what the job no longer "
            "needs, and a smaller --keep keeps fewer models",
        )  # fmt: skip


def _certificate_alerts(site: SiteFacts, now: float) -> Iterator[Alert]:
    for entry in site.certificates:
        left = entry.ends - now
        if entry.error:
            what, why = entry.error, "connections that need it fail"
        elif entry.begins > now:
            what, why = (
                f"{entry.path} is valid from {format_minute(entry.begins)} only",
                "clients refuse to connect",
            )
        elif left <= 0:
            what, why = f"{entry.path} expired on {format_minute(entry.ends)}", "clients refuse to connect"
        elif left <= _CERTIFICATE_NOTICE_S:
            what, why = f"{entry.path} expires on {format_minute(entry.ends)}", "then clients refuse to connect"
        else:
            continue
        ending = not entry.error and entry.begins <= now < entry.ends
        yield Alert("certificate", WARNING if ending else CRITICAL, now, what, why, entry.todo, subject=entry.path)


def _approval_alerts(seen: Snapshot, site: SiteFacts, now: float) -> Iterator[Alert]:
    for name, fingerprint in islice(site.waiting.items(), MAX_ALERTS_OF_KIND):
        yield Alert(
            "devices-wait", WARNING, now, f"{name} waits for approval", "until then all that it sends is dropped",
            "compare the key with what the board shows, then "
            + command("devices", "approve", name, "--key", fingerprint, *state_args(seen.folder)),
            device=name,
        )  # fmt: skip


def _unheard_board_alerts(seen: Snapshot, site: SiteFacts, now: float) -> Iterator[Alert]:
    """Boards that could join, and of which the server hears nothing else."""
    if not seen.running:
        return
    for name, joined in islice(site.unannounced.items(), MAX_ALERTS_OF_KIND):
        if now - joined >= _ANNOUNCEMENT_TIMEOUT_S:
            yield Alert(
                "device-unheard", WARNING if now - joined >= _MEASUREMENT_TIMEOUT_S else INFO, joined,
                f"{name} joined at {format_minute(joined)}, and its announcement has not come: it is off, still "
                f"measures itself, or {broker_drops('what it sends')}",
                "it takes no part until the server hears it",
                "see the board's own log; where that says that it is connected, look at the broker's rules for its "
                "name (docs/runbook.md#the-broker-drops-messages)",
                device=name,
            )  # fmt: skip


def _rollout_alerts(seen: Snapshot, rollout: RolloutStatus | None, now: float) -> Iterator[Alert]:
    if rollout is None:
        return
    status = command("rollout", "status", *state_args(seen.folder))
    about = f"the rollout of release {rollout.release}"
    if rollout.phase is RolloutPhase.STOPPED:
        failed = f"; it failed on {some(rollout.failed)}" if rollout.failed else ""
        why = "" if rollout.why in ("", "stopped") else f": {rollout.why.removeprefix('stopped: ')}"
        yield Alert(
            "rollout", WARNING if rollout.failed else INFO, now, f"{about} was stopped{why}{failed}",
            "boards have different releases",
            f"{status}; then fix the release and roll out a new one, or roll back: "
            f"{command('rollout', 'back', *state_args(seen.folder))}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.PAUSED:
        yield Alert(
            "rollout-paused", INFO, now, f"{about} is {rollout.why}", "no further board is given it",
            f"to go on: {command('rollout', 'resume', *state_args(seen.folder))}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.RUNNING and now - rollout.heard_at > _ROLLOUT_SILENCE_S:
        yield Alert(
            "rollout", WARNING, rollout.heard_at,
            f"{about} has heard of no board for {(now - rollout.heard_at) / 3600:.0f} h; it waits for "
            f"{some(rollout.left) or 'boards'}",
            "the next stage begins when enough boards of this one are well",
            f"{status}; start the boards that are off, or end it: "
            f"{command('rollout', 'stop', *state_args(seen.folder))}",
        )  # fmt: skip


def _absence_alerts(seen: Snapshot) -> Iterator[Alert]:
    """An alert for each board that no longer takes part, with the reason."""
    count = Counter[str]()
    for name, absence in seen.absences.items():
        count[absence.kind] += 1
        if count[absence.kind] <= MAX_ALERTS_OF_KIND:
            why, todo = _remedy(seen, name, absence)
            yield Alert(absence.kind, WARNING, absence.since, f"{name} {absence.reason}", why, todo, device=name)


def _remedy(seen: Snapshot, name: str, absence: Absence) -> tuple[str, str]:
    """What it leads to that a board doesn't take part, and what to do."""
    crashes = command("crashes", "--device", name, *state_args(seen.folder))
    revoke = command("devices", "revoke", name, *state_args(seen.folder))
    without = "rounds go on without what its samples would teach the model"
    match absence.kind:
        case participation.QUARANTINE:
            return "what it sends is dropped unread", (
                f"see the board's own log, by `{BOARD_LOG_COMMAND}` there; it ends by itself, and a board that isn't "
                f"yours is revoked by {revoke}"
            )
        case participation.CLONED:
            return "the two disturb each other, and the server hears now one and now the other", (
                "look for a second board with a copy of its card or state folder, and take it away; or give both new "
                f"keys: {command('devices', 'replace', name, *state_args(seen.folder))}, and let each join with a name "
                "and claim of its own (docs/runbook.md#two-boards-with-one-identity)"
            )
        case participation.UNDELIVERED:
            return "its part in the round can't come to an end, however long the deadline is", (
                "let the broker pass packets of at least 33,280 bytes (message_size_limit, max_packet_size), and what "
                "its rules must let through (docs/runbook.md#the-broker-drops-messages)"
            )
        case participation.AWAY:
            return without, (
                f"see that it has power and network, and {crashes}; a board that is gone for good is revoked by "
                f"{revoke}"
            )
        case participation.EXCLUDED:  # one that can't start has sent nothing but the reason
            return without, (
                f"mend what the reason names on the board and start it again; on the board `{BOARD_LOG_COMMAND}` shows "
                f"its log, and {crashes} how its program ended before (docs/runbook.md#a-board-cant-start)"
            )
        case _:
            return without, (
                f"mend what the reason names on the board and start it again; on the board `{BOARD_LOG_COMMAND}` shows "
                "its log (docs/runbook.md#a-board-cant-start)"
            )


def _join_flood_alert(client: str, now: float) -> Alert:
    """The key has no client id, because the sender chooses it; the text names it."""
    if client:
        sender, block = f"most of them lately from the MQTT client {client}", "block the client's address"
    else:
        sender = "from many MQTT clients"
        block = "wait for the others if you expect this many boards, since they ask again; else block their addresses"
    return Alert(
        "joins-flooded", WARNING, now,
        f"more requests to join arrive than the server reads, {sender}",
        "some are dropped, so boards may not get through with theirs; boards that have joined are not affected",
        f"{block}, which the broker's log shows; while no board is to join, close the broker's listener for joining "
        "(docs/security.md#floods)",
        delay_s=CROWDED_S,
    )  # fmt: skip
