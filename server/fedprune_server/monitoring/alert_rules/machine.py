"""Alerts about the server's machine: too little free space on its disk, and certificates that end or can't be used."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import ALERT_LEVELS, CRITICAL, WARNING, Alert, alert_rule, server_command
from fedprune_server.monitoring.participation import format_minute
from fedprune_server.monitoring.situation import Situation

# A certificate is an alert a month before it ends: holidays end within that time, so that somebody can replace it.
_CERTIFICATE_NOTICE_S = 30 * 24 * 3600.0

# A disk has too little free space below this share of it, and below this many bytes: a tenth of a large disk is plenty.
_DISK_WARNING_LIMIT, _DISK_CRITICAL_LIMIT = (0.1, 10e9), (0.03, 2e9)

# Less is critical on a disk of any size: 3 % of a small disk may be less than a round writes.
_MIN_FREE_BYTES = 256 * 2**20

# An open alert about the disk stays until this many times the limit is free, so that it doesn't open and close with
# each file that is written and deleted.
_DISK_RECOVERY_FACTOR = 1.2


@alert_rule("certificate", CRITICAL, WARNING)
def ending_certificates(situation: Situation, now: float) -> Iterator[Alert]:
    for entry in () if situation.site is None else situation.site.certificates:
        remaining_s = entry.ends - now
        if entry.error:
            what, why = entry.error, "connections that need it fail"
        elif entry.begins > now:
            what, why = f"{entry.path} is valid from {format_minute(entry.begins)} only", "clients refuse to connect"
        elif remaining_s <= 0:
            what, why = f"{entry.path} expired on {format_minute(entry.ends)}", "clients refuse to connect"
        elif remaining_s <= _CERTIFICATE_NOTICE_S:
            what, why = f"{entry.path} expires on {format_minute(entry.ends)}", "then clients refuse to connect"
        else:
            continue
        is_warning = not entry.error and entry.begins <= now < entry.ends
        severity = WARNING if is_warning else CRITICAL
        yield Alert("certificate", severity, now, what, why, entry.advice, subject=entry.path)


@alert_rule("disk", CRITICAL, WARNING)
def short_disk(situation: Situation, now: float) -> Iterator[Alert]:
    if situation.site is None or situation.site.disk is None:
        return
    free, total = situation.site.disk

    critical_bytes = max(_MIN_FREE_BYTES, _limit_bytes(total, *_DISK_CRITICAL_LIMIT))
    is_critical = free < _recovery_factor(situation, CRITICAL) * critical_bytes
    if is_critical or free < _recovery_factor(situation, WARNING) * _limit_bytes(total, *_DISK_WARNING_LIMIT):
        scale, unit = (1e9, "GB") if total >= 10e9 else (1e6, "MB")
        yield Alert(
            "disk", CRITICAL if is_critical else WARNING, now,
            f"the disk of {situation.folder} has {free / scale:.2f} of {total / scale:.0f} {unit} left",
            "a server without room ends (exit code 30); nothing is lost, but nothing goes on",
            f"make room; {server_command(situation.folder, 'check', options=('--repair',))} deletes what the job no "
            "longer needs, and a smaller --keep keeps fewer models",
        )  # fmt: skip


def _limit_bytes(total: int, share: float, max_bytes: float) -> float:
    return min(share * total, max_bytes)


def _recovery_factor(situation: Situation, severity: str) -> float:
    """The factor of a limit while the disk's alert of this severity, or of a higher one, is open."""
    severities = ALERT_LEVELS[ALERT_LEVELS.index(severity) :]
    return _DISK_RECOVERY_FACTOR if any(("disk", s) in situation.open_severities for s in severities) else 1.0
