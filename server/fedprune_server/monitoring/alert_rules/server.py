"""Alerts about the server itself: it doesn't run, hangs, waits for its database, or has no broker."""

from __future__ import annotations

from collections.abc import Iterator

from fedprune_server.monitoring.alerts import CRITICAL, HANG_THRESHOLD_S, Alert, alert_rule, server_command
from fedprune_server.monitoring.situation import Situation

# The broker may be away for this long before an alert opens: one that restarts is back within seconds.
_BROKER_DELAY_S = 15.0


@alert_rule("server-not-running", CRITICAL)
@alert_rule("server-hangs", CRITICAL)
@alert_rule("database-waits", CRITICAL)
@alert_rule("broker", CRITICAL)
def broken_server(situation: Situation, now: float) -> Iterator[Alert]:
    """Of a running server the first trouble that is found: each explains the ones below it."""
    if situation.is_running:
        if situation.suspended_process is not None:
            yield Alert(
                "server-hangs", CRITICAL, now - (situation.since_turn_s or 0.0),
                f"the server was suspended (Ctrl-Z, SIGSTOP): {situation.suspended_process.name}",
                "no message of a board is read meanwhile; nothing is lost",
                f"continue it: `fg` in its terminal, or `kill -CONT {situation.suspended_process.pid}`",
            )  # fmt: skip
        elif situation.since_turn_s is not None and situation.since_turn_s > HANG_THRESHOLD_S:
            yield Alert(
                "server-hangs", CRITICAL, now - situation.since_turn_s,
                f"the server's loop has not turned for {situation.since_turn_s:.0f} s",
                "no message of a board is read meanwhile",
                "see the server's log and the load of its disk; stop it and start it again: it continues where it was",
            )  # fmt: skip
        elif situation.waits_for:
            yield Alert(
                "database-waits", CRITICAL, now, f"the server waits for its database: {situation.waits_for}",
                "no message of a board is read meanwhile; nothing is lost, and the server goes on by itself",
                "continue the process that is named, or end it (docs/runbook.md#the-database-is-gone-or-locked); a "
                "database on another machine: see that it runs and can be reached",
            )  # fmt: skip
        elif situation.broker_problem:
            delay = min([_BROKER_DELAY_S, *(job.snapshot.deadline_s / 2 for job in situation.jobs)])
            yield Alert(
                "broker", CRITICAL, now, situation.broker_problem,
                "server and boards meet there; without it nothing moves",
                "see that the broker runs, that its address is right (--broker), and the firewall (docs/runbook.md)",
                delay_s=delay,
            )  # fmt: skip
        return
    for job in situation.jobs:
        if not job.has_begun:
            yield Alert(
                "server-not-running", CRITICAL, now, f"no job has begun in {job.folder}",
                "a server that couldn't start, or was never started, gives boards nothing to do",
                f"{server_command(job.folder, 'run', options=('--model', 'MODEL'))}; its messages at the start tell "
                "what it lacks",
                job=job.snapshot.name,
            )  # fmt: skip
        elif not job.snapshot.is_finished:
            yield Alert(
                "server-not-running", CRITICAL, now,
                f"no server runs on {job.folder}, and job {job.snapshot.name} is in round {job.round_text}",
                "boards wait for it, and train nothing meanwhile",
                server_command(job.folder, "run"), job=job.snapshot.name,
            )  # fmt: skip
