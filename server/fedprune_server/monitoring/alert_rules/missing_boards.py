"""Alerts about a job that lacks boards."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.coordination import Phase
from fedprune.core.text import first_few, quantity
from fedprune.wire.lost_pieces import dropping_broker_message
from fedprune_server.monitoring.alerts import (
    CRITICAL,
    WARNING,
    Alert,
    alert_rule,
    restart_advice,
    server_command,
    state_args,
)
from fedprune_server.monitoring.situation import Situation, WatchedJob


@alert_rule("no-devices", CRITICAL, WARNING)
@alert_rule("too-few-devices", WARNING)
def missing_boards(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        yield from _missing_boards(situation, job, now)


def _missing_boards(situation: Situation, job: WatchedJob, now: float) -> Iterator[Alert]:
    if situation.broker_problem:
        return  # without a broker no board can be connected, which has an alert of its own
    state = state_args(situation.folder)
    if not job.snapshot.known_devices and not situation.able_boards:
        claim = f"let a board in: {server_command('claim', '--device', 'NAME', *state)}; then on the board: "
        yield Alert(
            "no-devices", WARNING, now, f"no device has announced itself to job {job.snapshot.name} yet",
            "a round can't begin without boards",
            f"{claim}fedprune-device join, and fedprune-device run. A board that has joined measures itself first; its "
            "log has the reason if it doesn't connect. If it says that it is connected, "
            f"{dropping_broker_message('what it sends')} (docs/runbook.md#the-broker-drops-messages)",
            job=job.snapshot.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    if (
        not situation.is_running
        or job.snapshot.is_paused
        or (
            situation.able_boards
            and (job.snapshot.phase is not Phase.WAITING or situation.able_boards >= job.snapshot.min_devices)
        )
    ):
        return
    away = f"; away: {first_few(job.away_boards)}" if job.away_boards else ""
    names = sorted(job.snapshot.revoked_devices)
    revoked = f"; revoked: {first_few(names)}" if names else ""
    readmission = ""
    if names:
        name = names[0] if len(names) == 1 else "NAME"
        readmission = f"; for {first_few(names)}: {server_command('devices', 'replace', name, *state)}"
    if not situation.able_boards:
        yield Alert(
            "no-devices", CRITICAL, now,
            f"no board that can take part is connected, and job {job.snapshot.name} is in round "
            f"{job.round_text}{away}{revoked}",
            "nothing is trained until boards come back",
            "see that boards have power and network, and that the broker's port is open; "
            f"{server_command('crashes', *state)} shows programs that ended{readmission}",
            job=job.snapshot.name, delay_s=job.delay_s,
        )  # fmt: skip
        return
    remedy = f"let more boards in ({server_command('claim', '--device', 'NAME', *state)})"
    if job.away_boards:
        remedy = f"start the boards that are away ({server_command('crashes', *state)} shows programs that ended)"
    fewer = restart_advice(*state_args(job.folder), "--devices", situation.able_boards)
    yield Alert(
        "too-few-devices", WARNING, now,
        f"job {job.snapshot.name} waits for {quantity(job.snapshot.min_devices, 'device')}, and {situation.able_boards}"
        f" can take part now{away}{revoked}",
        f"a round begins with {quantity(job.snapshot.min_devices, 'device')}",
        f"{remedy}, or begin with fewer: {fewer}{readmission}",
        job=job.snapshot.name, delay_s=job.delay_s,
    )  # fmt: skip
