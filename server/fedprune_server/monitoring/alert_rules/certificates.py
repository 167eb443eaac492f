"""Alerts about certificates that end, or can't be used."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import CRITICAL, WARNING, Alert, alert_rule
from fedprune_server.monitoring.participation import format_minute
from fedprune_server.monitoring.situation import Situation

# A certificate is an alert a month before it ends: holidays end within that time, so that somebody can replace it.
_CERTIFICATE_NOTICE_S = 30 * 24 * 3600.0


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
