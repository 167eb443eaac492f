"""Alerts about rounds that bring no update, or wait for boards that are offline, and about wrong predictions."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.core.text import first_few, quantity
from fedprune_server.monitoring.alerts import CRITICAL, INFO, WARNING, Alert, alert_rule, restart_advice, server_command
from fedprune_server.monitoring.participation import UNDELIVERED, format_minute
from fedprune_server.monitoring.situation import Situation, WatchedJob


@alert_rule("no-progress", CRITICAL, counted=True)
def lost_rounds(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        if not job.snapshot.is_paused and (job.missed_deadlines or job.empty_rounds):
            yield _lost_rounds(situation, job, now)


@alert_rule("round-waits", WARNING, counted=True)
def stalled_rounds(situation: Situation, now: float) -> Iterator[Alert]:
    # Where no board is connected at all, the alert `no-devices` gives the reason.
    if situation.able_boards and not situation.broker_problem:
        for job in situation.open_jobs:
            if job.offline_since and not job.snapshot.is_paused:
                yield _stalled_round(job)


@alert_rule("prediction-off", INFO)
def bad_predictions(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        if job.prediction_excesses:
            yield _bad_predictions(job, now)


def _lost_rounds(situation: Situation, job: WatchedJob, now: float) -> Alert:
    cause = f"{quantity(job.missed_deadlines, 'deadline')} of {job.snapshot.deadline_s:g} s passed without an update"
    if not job.missed_deadlines:
        cause = f"{quantity(job.empty_rounds, 'round')} closed without a usable update"
    todo = (
        f"see each board's reason: {server_command(job.folder, 'status')}, and "
        f"{server_command(job.folder, 'crashes')}; if boards need longer: "
        f"{restart_advice(job.folder, '--deadline', f'{2 * job.snapshot.deadline_s:g}')}"
    )
    if undelivered := [name for name, absence in situation.absences.items() if absence.kind == UNDELIVERED]:
        todo = (
            f"a longer deadline won't help: see the alert about {first_few(undelivered)}, "
            "of which the broker drops messages"
        )
    return Alert(
        "no-progress", CRITICAL, now,
        f"job {job.snapshot.name} makes no progress in round {job.round_text}: {cause}",
        "the model doesn't move", todo, job=job.snapshot.name,
    )  # fmt: skip


def _stalled_round(job: WatchedJob) -> Alert:
    """The alert about a round that waits only for boards that are offline."""
    since, until = min(job.offline_since.values()), ""
    deadlines = [d for d in map(job.snapshot.awaited_devices.get, job.offline_since) if d is not None]
    if len(deadlines) == len(job.offline_since):
        pronoun = "it" if len(job.offline_since) == 1 else "them"
        until = f"; the round goes on without {pronoun} at {format_minute(max(deadlines))} (deadline)"
    return Alert(
        "round-waits", WARNING, since,
        f"round {job.snapshot.round} of job {job.snapshot.name} waits for {first_few(list(job.offline_since))}, "
        f"offline since {format_minute(since)}{until}",
        "nothing else of the round is under way: all other boards wait, too",
        "see that it has power and network: a board that comes back resumes its part; or start with a shorter "
        "--deadline (docs/rounds.md#slow-and-unreliable-boards)",
        job=job.snapshot.name, delay_s=job.offline_wait_s,
    )  # fmt: skip


def _bad_predictions(job: WatchedJob, now: float) -> Alert:
    figures = first_few([f"{name} {text}" for name, text in job.prediction_excesses.items()], "; ")
    return Alert(
        "prediction-off", INFO, now,
        f"{quantity(len(job.prediction_excesses), 'board')} of job {job.snapshot.name} needed far more than "
        f"predicted: {figures}",
        "a board that needs more memory than predicted may be killed, and one that needs more time may be late",
        f"compare with {server_command(job.folder, 'status')}, which shows the predictions before the "
        "first round, too; see what else runs on the board, or give it less (docs/planner.md)",
        job=job.snapshot.name,
    )  # fmt: skip
