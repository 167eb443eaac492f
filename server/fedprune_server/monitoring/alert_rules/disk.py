"""An alert about a disk that is short of room."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import CRITICAL, SEVERITIES, WARNING, Alert, alert_rule, command, state_args
from fedprune_server.monitoring.situation import Situation

_DISK_WARNING_LIMIT, _DISK_CRITICAL_LIMIT = (0.1, 10e9), (0.03, 2e9)
"""A disk is short of room below this share of it, and below this many bytes: a tenth of a large disk is plenty."""

_MIN_FREE_BYTES = 256 * 2**20
"""Less is critical on a disk of any size: of a small one, 3 % may be less than a round writes."""

_DISK_RECOVERY_FACTOR = 1.2
"""An open alert about the disk stays until this many times the limit is free, so that it doesn't open and close with
each file that is written and deleted."""


@alert_rule("disk", CRITICAL, WARNING)
def short_disk(seen: Situation, now: float) -> Iterator[Alert]:
    if seen.site is None or seen.site.disk is None:
        return
    free, total = seen.site.disk

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
