"""An alert about a disk that is short of room."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import (
    ALERT_LEVELS,
    CRITICAL,
    WARNING,
    Alert,
    alert_rule,
    server_command,
    state_args,
)
from fedprune_server.monitoring.situation import Situation

# A disk is short of room below this share of it, and below this many bytes: a tenth of a large disk is plenty.
_DISK_WARNING_LIMIT, _DISK_CRITICAL_LIMIT = (0.1, 10e9), (0.03, 2e9)

# Less is critical on a disk of any size: 3 % of a small disk may be less than a round writes.
_MIN_FREE_BYTES = 256 * 2**20

# An open alert about the disk stays until this many times the limit is free, so that it doesn't open and close with
# each file that is written and deleted.
_DISK_RECOVERY_FACTOR = 1.2


@alert_rule("disk", CRITICAL, WARNING)
def short_disk(situation: Situation, now: float) -> Iterator[Alert]:
    if situation.site is None or situation.site.disk is None:
        return
    free, total = situation.site.disk

    def is_short(severity: str, limit: tuple[float, float], min_bytes: float = 0.0) -> bool:
        as_severe = ALERT_LEVELS[ALERT_LEVELS.index(severity) :]
        factor = _DISK_RECOVERY_FACTOR if any(("disk", s) in situation.open_severities for s in as_severe) else 1.0
        share, max_bytes = limit
        return free < factor * max(min_bytes, min(share * total, max_bytes))

    is_critical = is_short(CRITICAL, _DISK_CRITICAL_LIMIT, _MIN_FREE_BYTES)
    if is_critical or is_short(WARNING, _DISK_WARNING_LIMIT):
        scale, unit = (1e9, "GB") if total >= 10e9 else (1e6, "MB")
        yield Alert(
            "disk", CRITICAL if is_critical else WARNING, now,
            f"the disk of {situation.folder} has {free / scale:.2f} of {total / scale:.0f} {unit} left",
            "a server without room ends (exit code 30); nothing is lost, but nothing goes on",
            f"make room; {server_command('check', *state_args(situation.folder), '--repair')} deletes what the job no "
            "longer needs, and a smaller --keep keeps fewer models",
        )  # fmt: skip
