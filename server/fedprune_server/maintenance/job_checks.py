"""Checks a job's settings and results for `doctor`; the alert rules cover its progress and its boards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fedprune.coordination import Phase
from fedprune.core.text import first_few, one_line, quantity
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune.planning.correction import Correction
from fedprune_server.executor.divergence import diagnose_history
from fedprune_server.maintenance.finding import Finding, note_finding, wrong_finding
from fedprune_server.maintenance.stall import STALL_ROUNDS, stall_cause, stall_scores
from fedprune_server.maintenance.stored_job import StoredJob
from fedprune_server.monitoring.alerts import BOARD_LOG_COMMAND, MAX_NAMES_SHOWN, restart_advice, server_command

# Recent rounds that are judged: one alone may be bad by chance, and older ones may have had other boards.
_RECENT_ROUNDS = 3

# Share of a round's devices that may be late before the deadline is to blame: fewer are slow for reasons of their own.
_MAX_LATE_SHARE = 0.5

# Strategies whose submodels are the first channels of one ranking, so that widths say which channels are trained.
_NESTED_STRATEGIES = frozenset(
    {"plain", "fedprune", "heterofl", "ca-hfp", "fedavg", "fedasync", "fedfix", "fedbuff", "fedper"}
)


def job_findings(job: StoredJob) -> Iterator[Finding]:
    if job.state.phase is not Phase.FINISHED and job.has_begun:
        checks = (_check_pause, _check_exclusions, _check_deadline, _check_refusals, _check_outliers, _check_coverage)
        for check in checks:
            yield from check(job)
    if job.state.phase is Phase.FINISHED or job.has_begun:
        # A stall is reported instead of a divergence: it explains a loss that rises only on the server's samples.
        yield from tuple(_check_stall(job)) or _check_divergence(job)


def _check_pause(job: StoredJob) -> Iterator[Finding]:
    if job.state.paused:
        yield note_finding(
            "paused",
            f"job {job.name} is paused",
            "no board is asked for anything until it continues",
            f"{server_command(job.folder, 'resume')}, or in the console (docs/console.md)",
        )


def _check_exclusions(job: StoredJob) -> Iterator[Finding]:
    reasons = {n: d.excluded for n, d in job.state.devices.items() if d.excluded}
    reasons |= {n: str(b.get("excluded", "")) for n, b in job.unplanned_devices.items()}
    reasons = {n: reason for n, reason in reasons.items() if n not in job.boards_with_alerts}
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        names_by_reason.setdefault(reason, []).append(name)
    for reason, names in sorted(names_by_reason.items(), key=lambda item: -len(item[1]))[:MAX_NAMES_SHOWN]:
        yield note_finding(
            "excluded-devices",
            f"{quantity(len(names), 'device')} of job {job.name} are excluded ({first_few(names)}): {reason}",
            "what they could learn is missing from the model",
            f"see {server_command(job.folder, 'status')}; docs/add-a-board.md lists what a board needs",
        )


def _check_deadline(job: StoredJob) -> Iterator[Finding]:
    limit = float(job.job_settings.get("deadline_s", math.inf))
    for row in job.state.history[-1:]:
        late = sorted(n for n, device_part in row["devices"].items() if _is_late(device_part))
        if len(row["devices"]) > 1 and len(late) >= _MAX_LATE_SHARE * len(row["devices"]):
            # `run` with options continues the stored job with a changed setting; a running server is stopped before.
            options = ("--deadline", math.ceil(2 * limit))
            advice = server_command(job.folder, "run", options=options)
            yield wrong_finding(
                "deadline-too-short",
                f"in round {row['round']} of job {job.name} {len(late)} of {len(row['devices'])} devices were late "
                f"for the deadline of {limit:g} s: {first_few(late)}",
                "what they trained didn't count",
                restart_advice(job.folder, *options) if job.is_running else advice,
            )


def _check_refusals(job: StoredJob) -> Iterator[Finding]:
    recent_rounds = [r for r in job.state.history[-_RECENT_ROUNDS:] if r["devices"]]
    device_parts = [p for r in recent_rounds for p in r["devices"].values()]
    if not device_parts:
        refused = (t for t in job.state.tasks.values() if t.progress is Progress.REFUSED)
        device_parts = [{"progress": t.progress.value, "reason": t.reason, "kind": t.kind} for t in refused]
    if not device_parts or any(p["progress"] == Progress.FOLDED.value for p in device_parts):
        return
    if all(_is_late(p) for p in device_parts):
        return  # the check of the deadline reports it
    counts = Counter(p.get("kind") or FailureKind.OTHER.value for p in device_parts if p["reason"])
    example = next((p["reason"] for p in reversed(device_parts) if p["reason"]), "")
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    yield wrong_finding(
        "all-updates-refused",
        f"none of the last {quantity(len(device_parts), 'update')} of job {job.name} counted ({kinds}), such as: "
        f"{one_line(example)}",
        "the model doesn't move",
        f"see each board's reason: {server_command(job.folder, 'status', options=('--rounds', _RECENT_ROUNDS))}; "
        f"and its log, on the board: {BOARD_LOG_COMMAND}",
    )


def _check_outliers(job: StoredJob) -> Iterator[Finding]:
    recent = [r for r in job.state.history[-_RECENT_ROUNDS:] if r["devices"]]
    reasons_by_device: dict[str, list[str]] = {}
    for row in recent:
        for name, device_part in sorted(row["devices"].items()):
            is_folded = device_part["progress"] == Progress.FOLDED.value
            if device_part["reason"] and (is_folded or device_part.get("kind") == FailureKind.OUTLIER):
                reasons_by_device.setdefault(name, []).append(device_part["reason"])
    for name, reasons in sorted(reasons_by_device.items(), key=lambda item: -len(item[1]))[:MAX_NAMES_SHOWN]:
        yield note_finding(
            "outlying-device",
            f"the updates of {name} stood out in {len(reasons)} of the last {quantity(len(recent), 'round')} of job "
            f"{job.name}: {one_line(reasons[-1])}",
            "they count for less than the board sent, or not at all, so that no single board decides the model "
            "(docs/security.md)",
            f"look at its samples and, on the board, at its log ({BOARD_LOG_COMMAND}); if it is not to be "
            f"trusted: {server_command(job.folder, 'devices', 'revoke', name)}",
        )
    devices = sorted(job.state.devices.items())
    doubts = [(n, Correction(**d.correction).doubt or (d.plan or {}).get("doubt", "")) for n, d in devices]
    for name, doubt in [(name, doubt) for name, doubt in doubts if doubt][:MAX_NAMES_SHOWN]:
        yield note_finding(
            "doubtful-claim",
            f"device {name} of job {job.name}: {doubt}",
            "how much of the model it trains goes by its rounds, and before the first by its own measurements",
            f"compare {server_command(job.folder, 'status')} with its log, on the board: {BOARD_LOG_COMMAND}",
        )


def _check_coverage(job: StoredJob) -> Iterator[Finding]:
    strategy = str(job.job_settings.get("strategy", ""))
    if strategy not in _NESTED_STRATEGIES or not job.group_sizes:
        return
    planned = (d.widths for d in job.state.devices.values() if not d.excluded)
    widths = [w for w in planned if len(w) == len(job.group_sizes)]
    if not widths:
        return
    widest = [(i, max(w[i] for w in widths), size) for i, size in enumerate(job.group_sizes)]
    uncovered = [(i, width, size) for i, width, size in widest if width < size]
    if uncovered:
        names = dict(enumerate(job.group_names))
        shares = [f"{names.get(i, i)}: {width} of {size}" for i, width, size in uncovered]
        yield note_finding(
            "uncovered-channels",
            f"in {quantity(len(uncovered), 'channel group')} of job {job.name} no device trains all channels "
            f"({first_few(shares)})",
            "the last channels of the ranking stay as they are, so that the whole model learns less than it could",
            f"add a larger board, raise the boards' limits (docs/planner.md), or export a narrower model; "
            f"{server_command(job.folder, 'status')} says which limit binds each board",
        )


def _check_divergence(job: StoredJob) -> Iterator[Finding]:
    trouble = diagnose_history(job.state.history, job.job_settings, uncalibrated=job.is_uncalibrated)
    if trouble:
        what, _, todo = trouble.partition(". ")
        yield wrong_finding("training-diverges", f"job {job.name}: {what}", "the model gets worse, not better", todo)


def _check_stall(job: StoredJob) -> Iterator[Finding]:
    """A finding on the part of a fleet that fails where the global model no longer improves."""
    scores = stall_scores(job.job_settings, job.state.history)
    cause = None if scores is None else stall_cause(scores)
    if scores is None or cause is None or (cause.in_training and any(_check_divergence(job))):
        return
    metric, status = scores.metric, server_command(job.folder, "status")
    yield note_finding(
        "model-stalls",
        f"the global model of job {job.name} has not improved for {STALL_ROUNDS} rounds: "
        f"{metric.titled_value(scores.now)} (at best {metric.value_text(scores.best)}), while boards score "
        f"{metric.value_text(scores.received)} on their own test data with the models that they receive, and "
        f"{metric.value_text(scores.trained)} after training: {cause.sentence}",
        "further rounds like these cost time and bytes, and change nothing",
        cause.advice.format(status=status, lr=job.job_settings.get("recipe", {}).get("lr")),
    )


def _is_late(device_part: Mapping[str, Any]) -> bool:
    if device_part["progress"] == Progress.FOLDED.value:
        return False
    return device_part.get("kind") == FailureKind.LATE or not device_part["reason"]
