"""Checks of `doctor` on a job's settings and results; the alert rules cover its progress and its boards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.core.metrics import METRICS
from fedprune.core.text import one_line, quantity, some
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.state import Progress
from fedprune_server.executor.divergence import of_history
from fedprune_server.maintenance.finding import Finding, note, wrong
from fedprune_server.monitoring.alerts import MAX_NAMES_SHOWN, command, restart_advice, state_args
from fedprune_server.monitoring.monitor import off_by_far
from fedprune_server.monitoring.round_rows import judging_metric, round_scores
from fedprune_server.monitoring.snapshot import JobStatus

_ROUNDS = 3
"""Rounds that are looked back at."""

_LATE = 0.5
"""Share of a round's devices that may be late before the deadline is what is wrong."""

_STALL_ROUNDS = 5
"""Evaluated rounds without a better global model after which that is no chance: single rounds of few boards vary."""

_EQUAL = 0.02
"""Scores that differ by less are equal: a share (accuracy) by 2 points, other metrics by 2 % of the score that they are
compared with. Test data of a board are often 50 to 200 samples, whose accuracy varies by as much."""

_NOTHING = 0.05
"""What a whole job has gained, by the same scale, that may be chance: its best round is the luckiest of many."""

_CLEAR = 0.1
"""Scores that differ by more differ for a reason, by the same scale."""

_WAY = 0.25
"""A model that has come less than this share of the way from its first score to another's is stuck. Of healthy fleets
with unlike data, whose boards score well on their few classes, the global model comes half of the way and more."""

_GOOD = 0.9
"""A share from which a model counts as good: one that was good when the job began need not improve."""

_OWN_PARTS = frozenset({"fedper", "local"})
"""Strategies that leave parts of the global model as they began, so that its score says nothing of the boards'."""

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
        away: Aggregators that are away.
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
    away: frozenset[str] = frozenset()
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
    def here(self) -> int:
        """Boards that are connected and can take part."""
        return sum(d.online and not d.excluded for d in self.state.devices.values()) if self.running else 0

    @property
    def status(self) -> JobStatus:
        job, state = self.job, self.state
        return JobStatus(
            self.name, self.folder, self.begun, state.phase, state.round, int(job.get("rounds", 0)), state.paused,
            int(job.get("devices", 1)), len(state.devices) + len(self.outsiders),
            sorted(n for n, d in state.devices.items() if not d.online and n not in self.revoked),
            sorted(self.revoked & state.devices.keys()),
            float(job.get("deadline_s", 600.0)),
            off=off_by_far(state),
        )  # fmt: skip


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
        reachable = [n for n in row["devices"] if not _is_cut_off(case, n)]
        late = sorted(n for n in reachable if _is_late(row["devices"][n]))
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
        f"see each board's reason: {command('status', *state_args(case.folder), '--rounds', _ROUNDS)}; and what the "
        f"boards say: {command('logs', *state_args(case.folder))}",
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
            f"look at its samples and its log ({command('logs', *state_args(case.folder))}); if it is not to be "
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
    judge, recipe = judging_metric(case.job), case.job.get("recipe", {})
    rounds = [round_scores(row, judge) for row in case.state.history]
    whole = [scores.whole for scores in rounds if math.isfinite(scores.whole)]
    of_boards = [scores for scores in rounds if math.isfinite(scores.received)]
    own_parts = case.job.get("strategy") in _OWN_PARTS or recipe.get("personal")
    if len(whole) <= _STALL_ROUNDS or not of_boards or own_parts:
        return
    metric, recent = METRICS[judge], of_boards[-_STALL_ROUNDS:]
    pick = max if metric.higher else min
    first, now, best = whole[0], math.fsum(whole[-_STALL_ROUNDS:]) / _STALL_ROUNDS, pick(whole)
    # What boards scored with the initial model; of a long job only the latest parts are kept, and the server's own
    # first score has to do.
    start = rounds[0].received if math.isfinite(rounds[0].received) else first
    received = math.fsum(scores.received for scores in recent) / len(recent)
    trained = math.fsum(scores.trained for scores in recent) / len(recent)

    def gain(before: float, after: float) -> float:
        change = after - before if metric.higher else before - after
        return change if metric.share else change / (abs(before) or 1.0)

    def is_stuck(begin: float, end: float, goal: float) -> bool:
        return gain(begin, goal) >= _CLEAR and gain(begin, end) < _WAY * gain(begin, goal)

    if gain(pick(whole[:-_STALL_ROUNDS]), best) > _EQUAL:
        return  # it still improves
    is_good = metric.share and received >= _GOOD
    is_lost = is_stuck(start, received, trained)
    if not is_lost and (is_good or gain(start, received) >= _CLEAR) and is_stuck(first, now, received):
        cause = "the models are good on the boards, and only the server's evaluation says otherwise"
        advice = (
            "compare the samples of [evaluation] with the boards': scaled alike, with the same numbers for the same "
            "classes, of all classes alike; boards that have few classes score higher on these alone"
        )
    elif any(_diverges(case)):
        return
    elif is_lost and is_stuck(first, now, trained):
        cause = "the boards learn, and aggregation loses what they learn"
        advice = (
            "the boards' data are unlike, their training between two rounds goes too far, or their models are of too "
            "different widths: lower lr or epochs or raise proximal in [job.recipe], have more boards in a round, or "
            f"give narrow models more (docs/planner.md). {command('status', *state_args(case.folder))} shows each "
            "board's width"
        )
    elif max(gain(start, trained), gain(first, best)) < _NOTHING and not is_good:
        cause = "the boards learn nothing either"
        advice = (
            f"try another lr in [job.recipe] (now {recipe.get('lr')}; ten times as much, and a tenth), and look at the "
            "boards' samples: scaled as the model expects, with the right labels (docs/board-data.md)"
        )
    else:
        return
    yield note(
        "model-stalls",
        f"the global model of job {case.name} has not improved for {_STALL_ROUNDS} rounds: {metric.said(now)} (at "
        f"best {metric.shown(best)}), while boards score {metric.shown(received)} on their own test data with the "
        f"models that they receive, and {metric.shown(trained)} after training: {cause}",
        "further rounds like these cost time and bytes, and change nothing",
        advice,
    )


def _foreseen(plan: Mapping[str, Any] | None) -> float | None:
    """Seconds of a round by a device's plan."""
    figures = (plan or {}).get("prediction", {})
    found = [figures.get(k) for k in ("train_s", "transfer_s")]
    return sum(map(float, found)) if all(isinstance(v, (int, float)) for v in found) else None


def _is_cut_off(case: Case, name: str) -> bool:
    """Whether a board's aggregator is away, which is a finding of its own."""
    device = case.state.devices.get(name)
    return device is not None and device.region.partition("/")[0] in case.away


def _is_late(part: Mapping[str, Any]) -> bool:
    if part["progress"] == Progress.FOLDED.value:
        return False
    return part.get("kind") == FailureKind.LATE or not part["reason"]


def _grouped(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        found.setdefault(reason, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1]))[:MAX_NAMES_SHOWN])
