"""Alerts about a job that lacks boards: none has come yet, none is left, or too few are there for a round."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.coordination import Phase
from fedprune.core.text import first_few, one_line, quantity
from fedprune.wire.lost_pieces import dropping_broker_message
from fedprune_server.monitoring.alerts import CRITICAL, WARNING, Alert, alert_rule, restart_advice, server_command
from fedprune_server.monitoring.situation import Situation, WatchedJob

_MAX_REASON_LENGTH = 300  # characters of a board's reason: a planner's reason with its hint has some two hundred


@alert_rule("no-devices", CRITICAL, WARNING)
@alert_rule("too-few-devices", WARNING)
def missing_boards(situation: Situation, now: float) -> Iterator[Alert]:
    if situation.broker_problem:
        return  # without a broker no board can be connected, which has an alert of its own
    for job in situation.open_jobs:
        snapshot = job.snapshot
        if not snapshot.known_devices and not situation.able_boards:
            yield _no_boards_yet(situation, job, now)
        elif situation.is_running and not snapshot.is_paused:
            if not situation.able_boards:
                yield _no_boards_left(situation, job, now)
            elif snapshot.phase is Phase.WAITING and situation.able_boards < snapshot.min_devices:
                yield _too_few_boards(situation, job, now)


def _no_boards_yet(situation: Situation, job: WatchedJob, now: float) -> Alert:
    return Alert(
        "no-devices", WARNING, now, f"no device has announced itself to job {job.snapshot.name} yet",
        "a round can't begin without boards",
        f"let a board in: {_claim_command(situation)}; then on the board: "
        "fedprune-device join, and fedprune-device run. A board that has joined measures itself first; its "
        "log has the reason if it doesn't connect. If it says that it is connected, "
        f"{dropping_broker_message('what it sends')} (docs/runbook.md#the-broker-drops-messages)",
        job=job.snapshot.name, delay_s=job.delay_s,
    )  # fmt: skip


def _no_boards_left(situation: Situation, job: WatchedJob, now: float) -> Alert:
    crashes = server_command(situation.folder, "crashes")
    remedy = (
        f"see that boards have power and network, and that the broker's port is open; {crashes} shows programs that "
        "ended"
    )
    excluded = ""
    if job.excluded_boards:
        name, reason = next(iter(job.excluded_boards.items()))
        excluded = f"; excluded: {first_few(list(job.excluded_boards))}"
        remedy = f"mend on the board why it is excluded, such as {name}: {one_line(reason, _MAX_REASON_LENGTH)}"
    return Alert(
        "no-devices", CRITICAL, now,
        f"no board that can take part is connected, and job {job.snapshot.name} is in round "
        f"{job.round_text}{excluded}{_missing_names(job)}",
        "nothing is trained until boards come back",
        f"{remedy}{_readmission(situation, job)}",
        job=job.snapshot.name, delay_s=job.delay_s,
    )  # fmt: skip


def _too_few_boards(situation: Situation, job: WatchedJob, now: float) -> Alert:
    remedy = f"let more boards in ({_claim_command(situation)})"
    if job.away_boards:
        crashes = server_command(situation.folder, "crashes")
        remedy = f"start the boards that are away ({crashes} shows programs that ended)"
    fewer, needed = restart_advice(job.folder, "--devices", situation.able_boards), job.snapshot.min_devices
    return Alert(
        "too-few-devices", WARNING, now,
        f"job {job.snapshot.name} waits for {quantity(needed, 'device')}, and {situation.able_boards}"
        f" can take part now{_missing_names(job)}",
        f"a round begins with {quantity(needed, 'device')}",
        f"{remedy}, or begin with fewer: {fewer}{_readmission(situation, job)}",
        job=job.snapshot.name, delay_s=job.delay_s,
    )  # fmt: skip


def _claim_command(situation: Situation) -> str:
    return server_command(situation.folder, "claim", "--device", "NAME")


def _missing_names(job: WatchedJob) -> str:
    away = f"; away: {first_few(job.away_boards)}" if job.away_boards else ""
    revoked = sorted(job.snapshot.revoked_devices)
    return away + (f"; revoked: {first_few(revoked)}" if revoked else "")


def _readmission(situation: Situation, job: WatchedJob) -> str:
    """How to let revoked boards in again; empty without any."""
    revoked = sorted(job.snapshot.revoked_devices)
    if not revoked:
        return ""
    name = revoked[0] if len(revoked) == 1 else "NAME"
    return f"; for {first_few(revoked)}: {server_command(situation.folder, 'devices', 'replace', name)}"
