"""Alerts about a rollout that was stopped or paused, or of which no board reports."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.core.text import some
from fedprune.releases.rollout import RolloutPhase
from fedprune_server.monitoring.alerts import INFO, WARNING, Alert, alert_rule, command, state_args
from fedprune_server.monitoring.situation import Situation

# A board installs a release within minutes. After this long without a report the others are off, or can't be reached.
_ROLLOUT_SILENCE_S = 6 * 3600.0


@alert_rule("rollout", WARNING, INFO)
@alert_rule("rollout-paused", INFO)
def halted_rollout(situation: Situation, now: float) -> Iterator[Alert]:
    rollout = None if situation.site is None else situation.site.rollout
    if rollout is None:
        return
    status = command("rollout", "status", *state_args(situation.folder))
    about = f"the rollout of release {rollout.release}"
    if rollout.phase is RolloutPhase.STOPPED:
        failed = f"; it failed on {some(rollout.failed)}" if rollout.failed else ""
        reason = "" if rollout.why in ("", "stopped") else f": {rollout.why.removeprefix('stopped: ')}"
        yield Alert(
            "rollout", WARNING if rollout.failed else INFO, now, f"{about} was stopped{reason}{failed}",
            "boards have different releases",
            f"{status}; then fix the release and roll out a new one, or roll back: "
            f"{command('rollout', 'back', *state_args(situation.folder))}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.PAUSED:
        yield Alert(
            "rollout-paused", INFO, now, f"{about} is {rollout.why}", "no further board is given it",
            f"to go on: {command('rollout', 'resume', *state_args(situation.folder))}",
        )  # fmt: skip
    elif rollout.phase is RolloutPhase.RUNNING and now - rollout.heard_at > _ROLLOUT_SILENCE_S:
        yield Alert(
            "rollout", WARNING, rollout.heard_at,
            f"{about} has heard of no board for {(now - rollout.heard_at) / 3600:.0f} h; it waits for "
            f"{some(rollout.left) or 'boards'}",
            "the next stage begins when enough boards of this one are well",
            f"{status}; start the boards that are off, or end it: "
            f"{command('rollout', 'stop', *state_args(situation.folder))}",
        )  # fmt: skip
