"""Alerts about a job that lacks boards."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.coordination import Phase
from fedprune.core.text import quantity, some
from fedprune.wire.lost_pieces import broker_drops
from fedprune_server.monitoring.alerts import (
    CRITICAL,
    WARNING,
    Alert,
    alert_rule,
    command,
    restart_advice,
    state_args,
)
from fedprune_server.monitoring.situation import Situation, WatchedJob


@alert_rule("no-devices", CRITICAL, WARNING)
@alert_rule("too-few-devices", WARNING)
def missing_boards(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        yield from _missing_boards(situation, job, now)


def _missing_boards(situation: Situation, job: WatchedJob, now: float) -> Iterator[Alert]:
    if situation.broker:
        return  # without a broker no board can be connected, which has an alert of its own
    state = state_args(situation.folder)
    if not job.seen.known_devices and not situation.here:
        claim = f"let a board in: {command('claim', '--device', 'NAME', *state)}; then on the board: "
        yield Alert(
            "no-devices", WARNING, now, f"no device has announced itself to job {job.seen.name} yet",
            "a round can't begin without boards",
            f"{claim}"
            "fedprune-device join, and fedprune-device run. A board that has joined measures itself first; its log "
            "has the reason if it doesn't connect. If it says that it is connected, "
            f"{broker_drops('what it sends')} (docs/runbook.md#the-broker-drops-messages)",
            job=job.seen.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    if (
        not situation.running
        or job.seen.paused
        or (situation.here and (job.seen.phase is not Phase.WAITING or situation.here >= job.seen.min_devices))
    ):
        return
    away = f"; away: {some(job.away)}" if job.away else ""
    names = sorted(job.seen.revoked)
    revoked = f"; revoked: {some(names)}" if names else ""
    readmission = ""
    if names:
        name = names[0] if len(names) == 1 else "NAME"
        readmission = f"; for {some(names)}: {command('devices', 'replace', name, *state)}"
    if not situation.here:
        yield Alert(
            "no-devices", CRITICAL, now,
            f"no board that can take part is connected, and job {job.seen.name} is in round "
            f"{job.of_rounds}{away}{revoked}",
            "nothing is trained until boards come back",
            "see that boards have power and network, and that the broker's port is open; "
            f"{command('crashes', *state)} shows programs that ended{readmission}",
            job=job.seen.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    remedy = f"let more boards in ({command('claim', '--device', 'NAME', *state)})"
    if job.away:
        remedy = f"start the boards that are away ({command('crashes', *state)} shows programs that ended)"
    fewer = restart_advice(*state_args(job.folder), "--devices", situation.here)
    yield Alert(
        "too-few-devices", WARNING, now,
        f"job {job.seen.name} waits for {quantity(job.seen.min_devices, 'device')}, and {situation.here} can take part "
        f"now{away}{revoked}",
        f"a round begins with {quantity(job.seen.min_devices, 'device')}",
        f"{remedy}, or begin with fewer: {fewer}{readmission}",
        job=job.seen.name, delay_s=job.delay_s,
    )  # fmt: skip
