"""Alerts about certificates that end, or can't be used."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import CRITICAL, WARNING, Alert, alert_rule
from fedprune_server.monitoring.participation import format_minute
from fedprune_server.monitoring.situation import Situation

_CERTIFICATE_NOTICE_S = 30 * 24 * 3600.0
"""A month before its end a certificate is an alert: within that time somebody will be there who replaces it."""


@alert_rule("certificate", CRITICAL, WARNING)
def ending_certificates(seen: Situation, now: float) -> Iterator[Alert]:
    for entry in () if seen.site is None else seen.site.certificates:
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
