"""Alerts about a rollout that was stopped or paused, or of which no board reports."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.core.text import first_few
from fedprune.releases.rollout import RolloutPhase
from fedprune_server.monitoring.alerts import INFO, WARNING, Alert, alert_rule, server_command
from fedprune_server.monitoring.situation import Situation

# A board installs a release within minutes. After this long without a report the others are off, or can't be reached.
_ROLLOUT_SILENCE_S = 6 * 3600.0


@alert_rule("rollout", WARNING, INFO)
@alert_rule("rollout-paused", INFO)
def halted_rollout(situation: Situation, now: float) -> Iterator[Alert]:
    rollout = None if situation.site is None else situation.site.rollout
    if rollout is None:
        return
    status = server_command(situation.folder, "rollout", "status")
    back = f", or roll back: {server_command(situation.folder, 'rollout', 'back')}"
    about = f"the rollout of release {rollout.release}"
    if rollout.phase is RolloutPhase.STOPPED:
        failed = f"; it failed on {first_few(rollout.failed_boards)}" if rollout.failed_boards else ""
        reason = "" if rollout.reason in ("", "stopped") else f": {rollout.reason.removeprefix('stopped: ')}"
        yield Alert(
            "rollout", WARNING if rollout.failed_boards else INFO, now, f"{about} was stopped{reason}{failed}",
            "boards have different releases" if rollout.release_boards else "no board has it",
            f"{status}; then fix the release and roll out a new one{back if rollout.release_boards else ''}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.PAUSED:
        yield Alert(
            "rollout-paused", INFO, now, f"{about} is {rollout.reason}", "no further board is given it",
            f"to go on: {server_command(situation.folder, 'rollout', 'resume')}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.RUNNING and now - rollout.last_report_at > _ROLLOUT_SILENCE_S:
        yield Alert(
            "rollout", WARNING, rollout.last_report_at,
            f"{about} has heard of no board for {(now - rollout.last_report_at) / 3600:.0f} h; it waits for "
            f"{first_few(rollout.pending_boards) or 'boards'}",
            "the next stage begins when enough boards of this one are well",
            f"{status}; start the boards that are off, or end it: "
            f"{server_command(situation.folder, 'rollout', 'stop')}",
        )  # fmt: skip
