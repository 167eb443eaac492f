"""Checks of `doctor` on a job's settings and results; the alert rules cover its progress and its boards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.core.text import one_line, quantity, some
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune_server.devices.plan_vs_actual import compare_latest
from fedprune_server.executor.divergence import of_history
from fedprune_server.maintenance.finding import Finding, note, wrong
from fedprune_server.maintenance.stall import STALL_ROUNDS, stall_cause, stall_scores
from fedprune_server.monitoring.alerts import BOARD_LOG_COMMAND, MAX_NAMES_SHOWN, command, restart_advice, state_args
from fedprune_server.monitoring.monitor import off_by_far
from fedprune_server.monitoring.situation import WatchedJob
from fedprune_server.observation.snapshot import JobSnapshot

_ROUNDS = 3
"""Rounds that are looked back at."""

_LATE = 0.5
"""Share of a round's devices that may be late before the deadline is what is wrong."""

_PREFIXES = frozenset({"plain", "fedprune", "heterofl", "ca-hfp", "fedavg", "fedasync", "fedfix", "fedbuff", "fedper"})
"""Strategies whose submodels are the first channels of one ranking, so that widths say which channels are trained."""


@dataclass(frozen=True)
class Case:
    """A job as it is stored.

    Attributes:
        settings: What `put_settings` kept.
        outsiders: Devices that can't be planned for.
        running: Whether a server runs on it.
        groups: Channels of each group of the model; empty if unknown.
        names: Names of the groups.
        revoked: Revoked devices without another key.
        uncalibrated: Whether the global model's batch-norm statistics are averages of the boards'.
        alerted: Boards that an open alert of the running server names.
    """

    folder: Path
    settings: Mapping[str, Any]
    state: State
    outsiders: Mapping[str, Mapping[str, Any]]
    running: bool
    groups: Sequence[int] = ()
    names: Sequence[str] = ()
    revoked: frozenset[str] = frozenset()
    uncalibrated: bool = False
    alerted: frozenset[str] = frozenset()

    @property
    def job(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.settings.get("job", {})
        return found

    @property
    def name(self) -> str:
        return str(self.job.get("name", "?"))

    @property
    def begun(self) -> bool:
        return bool(self.job) or self.running

    @property
    def watched(self) -> WatchedJob:
        """The job as the alert rules see it."""
        job, state = self.job, self.state
        seen = JobSnapshot(
            name=self.name,
            rounds=int(job.get("rounds", 0)),
            min_devices=int(job.get("devices", 1)),
            deadline_s=float(job.get("deadline_s", 600.0)),
            round=state.round,
            phase=state.phase,
            paused=state.paused,
            able_devices=state.devices.count(True) if self.running else 0,
            known_devices=len(state.devices) + len(self.outsiders),
            revoked=self.revoked & state.devices.keys(),
            compared=compare_latest(state),
        )
        away = sorted(n for n, d in state.devices.items() if not d.online and n not in self.revoked)
        return WatchedJob(seen=seen, folder=self.folder, begun=self.begun, away=away, off=off_by_far(seen))


def findings(case: Case) -> Iterator[Finding]:
    if case.state.phase is not Phase.FINISHED and case.begun:
        for check in (_paused, _excluded, _deadline, _refused, _outlying, _uncovered):
            yield from check(case)
    if case.state.phase is Phase.FINISHED or case.begun:
        # A loss that rises on the server's samples alone is no training that diverges.
        yield from tuple(_stalls(case)) or _diverges(case)


def _paused(case: Case) -> Iterator[Finding]:
    if case.state.paused:
        yield note(
            "paused",
            f"job {case.name} is paused",
            "no board is asked for anything until it continues",
            f"{command('resume', *state_args(case.folder))}, or in the console (docs/console.md)",
        )


def _excluded(case: Case) -> Iterator[Finding]:
    reasons = {n: d.excluded for n, d in case.state.devices.items() if d.excluded}
    reasons |= {n: str(b.get("excluded", "")) for n, b in case.outsiders.items()}
    reasons = {n: reason for n, reason in reasons.items() if n not in case.alerted}
    for reason, names in _grouped(reasons).items():
        yield note(
            "excluded-devices",
            f"{quantity(len(names), 'device')} of job {case.name} are excluded ({some(names)}): {reason}",
            "what they could learn is missing from the model",
            f"see {command('status', *state_args(case.folder))}; docs/add-a-board.md lists what a board needs",
        )


def _deadline(case: Case) -> Iterator[Finding]:
    limit = float(case.job.get("deadline_s", math.inf))
    slow = {
        n: seconds
        for n, d in case.state.devices.items()
        if not d.excluded and (seconds := _foreseen(d.plan)) is not None and seconds > limit
    }
    if slow:
        worst = max(slow, key=lambda n: slow[n])
        yield wrong(
            "deadline-too-short",
            f"the deadline of job {case.name} is {limit:g} s, and {quantity(len(slow), 'device')} will need more, by "
            f"their plans: {some(sorted(slow))}, {worst} {slow[worst]:.0f} s",
            "their updates come too late, and after a few such rounds they are excluded",
            _longer(case, 1.5 * slow[worst]),
        )
        return
    for row in case.state.history[-1:]:
        late = sorted(n for n, part in row["devices"].items() if _is_late(part))
        if len(row["devices"]) > 1 and len(late) >= _LATE * len(row["devices"]):
            yield wrong(
                "deadline-too-short",
                f"in round {row['round']} of job {case.name} {len(late)} of {len(row['devices'])} devices were late "
                f"for the deadline of {limit:g} s: {some(late)}",
                "what they trained didn't count",
                _longer(case, 2 * limit),
            )


def _longer(case: Case, seconds: float) -> str:
    words = (*state_args(case.folder), "--deadline", math.ceil(seconds))
    return restart_advice(*words) if case.running else command("run", *words)


def _refused(case: Case) -> Iterator[Finding]:
    rows = [r for r in case.state.history[-_ROUNDS:] if r["devices"]]
    parts = [p for r in rows for p in r["devices"].values()]
    if not parts:
        refused = (t for t in case.state.tasks.values() if t.progress is Progress.REFUSED)
        parts = [{"progress": t.progress.value, "reason": t.reason, "kind": t.kind} for t in refused]
    if not parts or any(p["progress"] == Progress.FOLDED.value for p in parts):
        return
    if all(_is_late(p) for p in parts):
        return  # as the check of the deadline reports
    counts = Counter(p.get("kind") or FailureKind.OTHER.value for p in parts if p["reason"])
    example = next((p["reason"] for p in reversed(parts) if p["reason"]), "")
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    yield wrong(
        "all-updates-refused",
        f"none of the last {quantity(len(parts), 'update')} of job {case.name} counted ({kinds}), such as: "
        f"{one_line(example)}",
        "the model doesn't move",
        f"see each board's reason: {command('status', *state_args(case.folder), '--rounds', _ROUNDS)}; and its log, on "
        f"the board: {BOARD_LOG_COMMAND}",
    )


def _outlying(case: Case) -> Iterator[Finding]:
    rows = [r for r in case.state.history[-_ROUNDS:] if r["devices"]]
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, part in sorted(row["devices"].items()):
            folded = part["progress"] == Progress.FOLDED.value
            if part["reason"] and (folded or part.get("kind") == FailureKind.OUTLIER):
                found.setdefault(name, []).append(part["reason"])
    for name, reasons in sorted(found.items(), key=lambda item: -len(item[1]))[:MAX_NAMES_SHOWN]:
        yield note(
            "outlying-device",
            f"the updates of {name} stood out in {len(reasons)} of the last {quantity(len(rows), 'round')} of job "
            f"{case.name}: {one_line(reasons[-1])}",
            "they count for less than the board sent, or not at all, so that no single board decides the model "
            "(docs/security.md)",
            f"look at its samples and, on the board, at its log ({BOARD_LOG_COMMAND}); if it is not to be "
            f"trusted: {command('devices', 'revoke', name, *state_args(case.folder))}",
        )


def _uncovered(case: Case) -> Iterator[Finding]:
    strategy = str(case.job.get("strategy", ""))
    if strategy not in _PREFIXES or not case.groups:
        return
    widths = [d.widths for d in case.state.devices.values() if not d.excluded and len(d.widths) == len(case.groups)]
    if not widths:
        return
    bare = [(i, max(w[i] for w in widths), size) for i, size in enumerate(case.groups)]
    short = [(i, most, size) for i, most, size in bare if most < size]
    if short:
        shares = [f"{case.names[i] if i < len(case.names) else i}: {most} of {size}" for i, most, size in short]
        yield note(
            "uncovered-channels",
            f"in {quantity(len(short), 'channel group')} of job {case.name} no device trains all channels "
            f"({some(shares)})",
            "the last channels of the ranking stay as they are, so that the whole model learns less than it could",
            f"take a larger board in, give boards more (docs/planner.md), or take out a narrower model; "
            f"{command('status', *state_args(case.folder))} says which limit binds each board",
        )


def _diverges(case: Case) -> Iterator[Finding]:
    trouble = of_history(case.state.history, case.job, uncalibrated=case.uncalibrated)
    if trouble:
        what, _, todo = trouble.partition(". ")
        yield wrong("training-diverges", f"job {case.name}: {what}", "the model gets worse, not better", todo)


def _stalls(case: Case) -> Iterator[Finding]:
    """Says which part of a fleet fails where the global model no longer improves, and nothing where none does."""
    scores = stall_scores(case.job, case.state.history)
    cause = None if scores is None else stall_cause(scores)
    if scores is None or cause is None or (cause.in_training and any(_diverges(case))):
        return
    metric, status = scores.metric, command("status", *state_args(case.folder))
    yield note(
        "model-stalls",
        f"the global model of job {case.name} has not improved for {STALL_ROUNDS} rounds: {metric.said(scores.now)} "
        f"(at best {metric.shown(scores.best)}), while boards score {metric.shown(scores.received)} on their own test "
        f"data with the models that they receive, and {metric.shown(scores.trained)} after training: {cause.sentence}",
        "further rounds like these cost time and bytes, and change nothing",
        cause.advice.format(status=status, lr=case.job.get("recipe", {}).get("lr")),
    )


def _foreseen(plan: Mapping[str, Any] | None) -> float | None:
    """Seconds of a round by a device's plan."""
    figures = (plan or {}).get("prediction", {})
    found = [figures.get(k) for k in ("train_s", "transfer_s")]
    return sum(map(float, found)) if all(isinstance(v, (int, float)) for v in found) else None


def _is_late(part: Mapping[str, Any]) -> bool:
    if part["progress"] == Progress.FOLDED.value:
        return False
    return part.get("kind") == FailureKind.LATE or not part["reason"]


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        found.setdefault(reason, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1]))[:MAX_NAMES_SHOWN])
