"""Alerts about rounds that bring nothing, or wait, and about predictions that are wrong."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune.core.text import quantity, some
from fedprune_server.monitoring.alerts import (
    CRITICAL,
    INFO,
    WARNING,
    Alert,
    alert_rule,
    command,
    restart_advice,
    state_args,
)
from fedprune_server.monitoring.participation import UNDELIVERED, format_minute
from fedprune_server.monitoring.situation import Situation, WatchedJob


@alert_rule("no-progress", CRITICAL, counted=True)
def lost_rounds(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        yield from _lost_rounds(situation, job, now)


@alert_rule("round-waits", WARNING, counted=True)
def stalled_rounds(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        yield from _stalled_round(situation, job)


@alert_rule("prediction-off", INFO)
def bad_predictions(situation: Situation, now: float) -> Iterator[Alert]:
    for job in situation.open_jobs:
        yield from _bad_predictions(job, now)


def _lost_rounds(situation: Situation, job: WatchedJob, now: float) -> Iterator[Alert]:
    if job.seen.paused or not (job.missed or job.empty):
        return
    loss = f"{quantity(job.missed, 'deadline')} of {job.seen.deadline_s:g} s passed without an update"
    if not job.missed:
        loss = f"{quantity(job.empty, 'round')} closed without a usable update"
    todo = (
        f"see each board's reason: {command('status', *state_args(job.folder))}, and "
        f"{command('crashes', *state_args(job.folder))}; if boards need longer: "
        f"{restart_advice(*state_args(job.folder), '--deadline', f'{2 * job.seen.deadline_s:g}')}"
    )
    if undelivered := [name for name, absence in situation.absences.items() if absence.kind == UNDELIVERED]:
        todo = (
            f"a longer deadline won't help: see the alert about {some(undelivered)}, of which the broker drops messages"
        )
    yield Alert(
        "no-progress", CRITICAL, now,
        f"job {job.seen.name} makes no progress in round {job.of_rounds}: {loss}",
        "the model doesn't move", todo, job=job.seen.name,
    )  # fmt: skip


def _stalled_round(situation: Situation, job: WatchedJob) -> Iterator[Alert]:
    """A round that waits for boards that are offline, and for nothing else."""
    # Where no board is connected at all, the alert `no-devices` gives the reason.
    if not job.offline_since or job.seen.paused or situation.broker or not situation.here:
        return
    since, until = min(job.offline_since.values()), ""
    deadlines = [deadline for deadline in map(job.seen.awaited.get, job.offline_since) if deadline is not None]
    if len(deadlines) == len(job.offline_since):
        pronoun = "it" if len(job.offline_since) == 1 else "them"
        until = f"; the round goes on without {pronoun} at {format_minute(max(deadlines))} (deadline)"
    yield Alert(
        "round-waits", WARNING, since,
        f"round {job.seen.round} of job {job.seen.name} waits for {some(list(job.offline_since))}, offline since "
        f"{format_minute(since)}{until}",
        "nothing else of the round is under way: all other boards wait, too",
        "see that it has power and network: a board that comes back resumes its part; or start with a shorter "
        "--deadline (docs/rounds.md#slow-and-unreliable-boards)",
        job=job.seen.name, delay_s=job.offline_wait_s,
    )  # fmt: skip


def _bad_predictions(job: WatchedJob, now: float) -> Iterator[Alert]:
    if job.off:
        figures = some([f"{name} {text}" for name, text in job.off.items()], "; ")
        yield Alert(
            "prediction-off", INFO, now,
            f"{quantity(len(job.off), 'board')} of job {job.seen.name} needed far more than planned: {figures}",
            "a board that needs more memory than planned may be killed, and one that needs more time may be late",
            f"compare with {command('status', *state_args(job.folder))}, which shows the predictions before the first "
            "round, too; see what else runs on the board, or give it less (docs/planner.md)",
            job=job.seen.name,
        )  # fmt: skip
