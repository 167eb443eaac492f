"""Checks everything about a fleet that can be seen from the server's machine, for `fedprune-server doctor`.

    diagnose(folder)  >  for each job of the folder: load it, and check it (`job_checks`)
                      >  for the server: the checks in `CHECKS`, here and in `connection_checks`
                      >  findings, without those that follow from others

Nothing is changed. `fedprune-server check` (`state_check`) reads the files themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedprune.coordination import State
from fedprune.core.disk import has_lock_holder, read_file
from fedprune.core.errors import FedpruneError
from fedprune.core.text import quantity
from fedprune.model.recipe import Recipe
from fedprune_server.devices.crash_store import read_crashes
from fedprune_server.devices.quarantine import read_quarantine_rows
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.executor.divergence import is_uncalibrated
from fedprune_server.maintenance import connection_checks
from fedprune_server.maintenance.backup_manifest import last_backup
from fedprune_server.maintenance.connection_checks import CheckedSite, TooSlowError, run_within
from fedprune_server.maintenance.finding import (
    Finding,
    Severity,
    alert_finding,
    note_finding,
    unknown_finding,
    wrong_finding,
)
from fedprune_server.maintenance.identity_check import check_identity, find_revoked_devices
from fedprune_server.maintenance.job_checks import job_findings
from fedprune_server.maintenance.stored_job import StoredJob
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.alerts import MAX_NAMES_SHOWN, MISSING_BOARD_KINDS, server_command
from fedprune_server.monitoring.monitor_record import read_running_monitor
from fedprune_server.monitoring.participation import format_minute, quarantine_absence
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import Situation, suspended_server
from fedprune_server.storage.database import DatabaseLockedError, LostConnectionError, translate_errors
from fedprune_server.storage.folder_layout import DATABASE_FILE, MODEL_FILE, job_folders
from fedprune_server.storage.folder_lock import LOCK_FILE
from fedprune_server.storage.lease import leader_elsewhere
from fedprune_server.storage.sqlite_file import sqlite_lock_holders, write_lock_holders
from fedprune_server.storage.storage import Storage

if TYPE_CHECKING:
    from fedprune_export.pruning.model import Model

_DAY_S = 24 * 3600.0

# The docs ask for a backup each night: a week without one is more than a night that failed.
_MAX_BACKUP_AGE_S = 7 * _DAY_S

# How far the clock of the server that wrote the last event may be ahead of this machine's: quartz clocks without NTP
# drift apart by less within weeks.
_MAX_CLOCK_LEAD_S = 120.0

# How long to wait for a lock that another process may keep: no transaction of the server lasts so long.
LOCK_TIMEOUT_S = 2.0

# A machine without a battery for its clock begins in 1970, or when its image was made: no right clock shows an earlier
# time than this, in seconds since 1970.
_MIN_TIME = 1_750_000_000  # June 2025


def diagnose(folder: Path, timeout_s: float = 5.0) -> list[Finding]:
    """All findings about a server and its fleet, the worst first. Raises `StorageError` if `folder` has no server."""
    everything = list(_all_findings(folder, timeout_s))
    kinds = {finding.kind for finding in everything}
    consequences = set[str]()
    if "second-server" in kinds:
        consequences.add("server-not-running")  # a start here would be refused
    if "broker" in kinds:
        consequences.update(MISSING_BOARD_KINDS)  # without a broker no board can be there
    causes = [finding for finding in everything if finding.kind not in consequences]
    return sorted(causes, key=lambda f: tuple(Severity).index(f.severity))


def _all_findings(folder: Path, timeout_s: float) -> Iterator[Finding]:
    Storage.check_existing(folder)
    identity_findings = list(check_server_identity(folder))
    revoked_boards, leader = frozenset[str](), ""
    # A database that can't be read is a finding below.
    has_identity = False
    with suppress(FedpruneError):
        if not identity_findings and (folder / IDENTITY).is_dir():
            revoked_boards = run_within(timeout_s, lambda: find_revoked_devices(folder))
            has_identity = True
    with suppress(FedpruneError):
        leader = run_within(timeout_s, lambda: leader_elsewhere(folder))
    monitor_record = read_running_monitor(folder)
    jobs, event_times = list[StoredJob](), list[float]()
    alerted = frozenset(a.device for a in monitor_record.current_alerts if a.device is not None)
    for job_folder in (folder, *job_folders(folder)):
        load = partial(_load_stored_job, job_folder, revoked_boards, leader)
        try:
            job, event_at = run_within(timeout_s, load)
        except FedpruneError as error:
            yield _database_finding(job_folder, error)
            has_identity = has_identity and job_folder != folder  # members are in the same database
            continue
        event_times += [] if event_at is None else [event_at]
        jobs.append(replace(job, boards_with_alerts=alerted))
        yield from job_findings(jobs[-1])
    yield from identity_findings
    site = CheckedSite(
        folder=folder,
        settings=jobs[0].settings.get("server", {}) if jobs else {},
        is_running=has_lock_holder(folder / LOCK_FILE) and not leader,
        leader=leader,
        has_identity=has_identity,
        jobs=jobs,
        last_event_at=max(event_times, default=None),
        monitor_record=monitor_record,
        timeout_s=timeout_s,
    )
    kinds: set[str] = set()
    for check in CHECKS:
        try:
            for finding in check(site):
                # The alert of a running server has reported the broker already, before the check of it.
                if finding.kind != "broker" or "broker" not in kinds:
                    yield finding
                kinds.add(finding.kind)
        except FedpruneError as error:  # noqa: PERF203 - a finding itself, so that the other checks run
            advice = server_command(site.folder, "check")
            yield wrong_finding("unreadable", str(error), "it couldn't be looked at", advice)


def _database_finding(folder: Path, error: FedpruneError) -> Finding:
    if isinstance(error, TooSlowError):  # this process, too, may have had too little of the machine
        message = f"the database of {folder} was not read: {error}"
        advice = "let doctor wait longer (--timeout); if that doesn't help, see that the database runs"
        return unknown_finding("database", message, "it holds all that the job is", advice)
    if isinstance(error, (LostConnectionError, DatabaseLockedError)):
        advice = "see that it runs, that this machine reaches it, and who has locked it; a server goes on by itself"
    else:
        advice = f"{server_command(folder, 'check')}, or restore a backup"
    message = f"the database of {folder} can't be read: {error}"
    return wrong_finding("database", message, "it holds all that the job is", advice)


def _load_stored_job(folder: Path, revoked_boards: frozenset[str], leader: str) -> tuple[StoredJob, float | None]:
    """A job as it is stored, and the time of its last event."""
    if Storage.read_settings(folder) is None:  # commands have begun the database, or a server that couldn't start
        return StoredJob(folder, {}, State(model=""), {}, has_lock_holder(folder / LOCK_FILE)), None
    with Storage.open_existing(folder) as storage:
        settings, state = storage.settings() or {}, storage.load()
        outsiders, last_event_at = storage.unplanned_devices(), storage.log.last_at()
    running = has_lock_holder(folder / LOCK_FILE) or bool(leader)
    job = StoredJob(folder, settings, state or State(model=""), outsiders, running, revoked_devices=revoked_boards)
    if (model := _load_model(folder)) is None:
        return job, last_event_at
    architecture, recipe = model.architecture, Recipe.from_dict(job.job_settings.get("recipe", {}))
    return replace(
        job,
        group_sizes=tuple(architecture.sizes),
        group_names=tuple(g.name for g in architecture.groups),
        is_uncalibrated=is_uncalibrated(architecture, recipe, settings.get("calibration"), model.frozen),
    ), last_event_at


def _load_model(folder: Path) -> Model | None:
    """The model with which a job began; None where it can't be read."""
    from fedprune_export.importing import import_onnx

    try:
        return import_onnx(read_file(folder / MODEL_FILE), MODEL_FILE)
    except (OSError, FedpruneError):
        return None


def check_alerts(site: CheckedSite) -> Iterator[Finding]:
    """Alerts of rules that the state folder satisfies, and others that a running server has open."""
    record = site.monitor_record
    rows = sorted(read_quarantine_rows(site.folder).items()) if site.is_running else []
    absences = {n: quarantine_absence(str(r["reason"]), site.now) for n, r in rows if (r["until"] or 0.0) > site.now}
    jobs = [job.watched_job for job in site.jobs]
    situation = Situation(
        site.folder,
        jobs,
        able_boards=sum(job.snapshot.able_devices for job in jobs),
        is_running=site.is_running or bool(site.leader),
        since_turn_s=None if record.turned_at is None else max(0.0, site.now - record.turned_at),
        suspended_process=suspended_server(site.folder) if site.is_running else None,
        absences=absences,
        site=site_facts(site.folder, site.settings, members=site.has_identity),
    )
    alerts = {a.key: a for a in evaluate_alerts(situation, site.now)}
    for alert in record.current_alerts:
        alerts.setdefault(alert.key, alert)
    yield from map(alert_finding, alerts.values())


def check_server_identity(folder: Path) -> Iterator[Finding]:
    if (folder / IDENTITY).is_dir():
        for finding in check_identity(folder / IDENTITY):
            advice = finding.advice or "See docs/back-up.md#check."
            why = "without it the server can't prove its identity to boards"
            yield replace(finding, kind="identity", why=why, advice=advice)


def check_lock(site: CheckedSite) -> Iterator[Finding]:
    """Whether another process keeps the lock that a server needs for each change."""
    path = site.folder / DATABASE_FILE
    if not path.is_file() or any(a.kind == "database-waits" for a in site.monitor_record.current_alerts):
        return  # the running server reports it in an alert
    if not site.is_running and not sqlite_lock_holders(path):
        return  # and nothing is opened for writing, which would change what a crash has left
    with translate_errors(str(path)):
        holders = write_lock_holders(path, min(site.timeout_s, LOCK_TIMEOUT_S))
    if holders:
        yield wrong_finding(
            "database-locked",
            f"{path} is locked by {' and '.join(holders)}",
            "the server waits with its next change, and answers no board meanwhile"
            if site.is_running
            else "a server that is started waits until it is free, as do commands that change something",
            "let that process go on, or end it" + ("; the server goes on by itself" if site.is_running else ""),
        )


def check_clock(site: CheckedSite) -> Iterator[Finding]:
    now, last_event_at = site.now, site.last_event_at
    is_behind = last_event_at is not None and last_event_at > now + _MAX_CLOCK_LEAD_S
    if now < _MIN_TIME or is_behind:
        last_event = ""
        if is_behind and last_event_at is not None:
            last_event = f"; the job's last event was at {format_minute(last_event_at)}"
        yield wrong_finding(
            "clock",
            f"this machine's clock says {format_minute(now)}{last_event}",
            "deadlines, certificates and what boards take for the time go by it",
            "set the clock: timedatectl set-ntp true",
        )


def check_crashes(site: CheckedSite) -> Iterator[Finding]:
    try:
        rows = read_crashes(site.folder, limit=5000)
    except FedpruneError as error:
        yield note_finding("crash-reports", str(error), "boards' crash reports can't be shown", "Delete the file.")
        return
    recent_rows = [r for r in rows if site.now - r.received < _DAY_S]
    if recent_rows:
        names, last = sorted({r.device for r in recent_rows}), recent_rows[-1]
        yield note_finding(
            "crashes",
            f"{quantity(len(names), 'board')} crashed within a day ({', '.join(names[:MAX_NAMES_SHOWN])}), lastly "
            f"{last.device}: {last.text}",
            "a board that crashes trains nothing meanwhile",
            server_command(site.folder, "crashes", "--device", last.device),
        )


def check_backups(site: CheckedSite) -> Iterator[Finding]:
    backup_at = last_backup(site.folder)
    if backup_at is not None and site.now - backup_at < _MAX_BACKUP_AGE_S:
        return
    backup_age = "no backup was ever made" if backup_at is None else f"the last backup is of {format_minute(backup_at)}"
    yield note_finding(
        "backup",
        f"{backup_age} with `fedprune-server backup` from {site.folder}",
        "with the disk, the model and the identity of the fleet would be lost",
        server_command(site.folder, "backup", options=("--to", "PLACE")),
    )


def check_leader(site: CheckedSite) -> Iterator[Finding]:
    """Whether the job is another server's for now."""
    if site.leader:
        has_standby = has_lock_holder(site.folder / LOCK_FILE)
        standby = "the standby server here continues it" if has_standby else "no server waits here to continue it"
        yield note_finding(
            "standby",
            f"a server elsewhere has the job: {site.leader}",
            f"when that server ends, {standby}",
            "look after the fleet there: its log, and its `fedprune-server doctor`",
        )


# The checks on a server; those on its jobs are in `job_checks`. Alerts come first, because they explain later findings.
CHECKS: tuple[Callable[[CheckedSite], Iterable[Finding]], ...] = (
    check_alerts,
    check_lock,
    check_clock,
    connection_checks.check_broker,
    check_leader,
    connection_checks.check_other_servers,
    connection_checks.check_revocations,
    connection_checks.check_bucket,
    check_crashes,
    check_backups,
)
