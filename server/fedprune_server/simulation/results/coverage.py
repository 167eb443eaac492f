"""Which boards a run's results are of: scores of different boards can't be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedprune.coordination.width_planner import WHOLE_HINT
from fedprune.core.text import first_few, quantity
from fedprune_server.simulation.results.record import Record

PAPERS_SETTING = "ignores_plans = true"


def needs_whole(reason: str) -> bool:
    """Whether a board is left out, for this reason, because the strategy needs the whole model."""
    return reason.endswith(WHOLE_HINT)


def coverage_mark(run: Record) -> str:
    """How many devices a run covers, to be added to its name; empty for all, or if none is known."""
    covered, fleet = len(run.delivered), len(run.devices)
    return f" ({covered} of {fleet} devices)" if 0 < covered < fleet else ""


def with_coverage_marks(runs: Sequence[Record]) -> list[Record]:
    """The runs, whose titles say how many devices they cover if that isn't all."""
    return [replace(run, title=run.title + coverage_mark(run)) for run in runs]


def on_common_boards(*runs: Record) -> list[Record]:
    """The runs, with local scores of only those boards that have one in all of them."""
    common = set.intersection(*(set(run.latest) for run in runs))
    return [
        replace(
            run, rounds=tuple(replace(r, local={k: v for k, v in r.local.items() if k in common}) for r in run.rounds)
        )
        for run in runs
    ]


def left_out_boards(runs: Iterable[Record]) -> dict[str, dict[str, str]]:
    """By strategy, the reason for each board that no plan of it fits."""
    reasons: dict[str, dict[str, str]] = {}
    for run in runs:
        reasons.setdefault(str(run.job.get("strategy", run.title)), {}).update(
            {d.name: d.excluded for d in run.devices if d.excluded and not d.widths}
        )
    return {strategy: boards for strategy, boards in reasons.items() if boards}


def left_out_note(reasons: Mapping[str, Mapping[str, str]]) -> str:
    """How many boards each strategy leaves out, one of the reasons, and how it wouldn't; empty if none does."""
    if not reasons:
        return ""
    counts = ", ".join(f"{name} leaves {quantity(len(boards), 'board')} out" for name, boards in reasons.items())
    example, reason = min(next(iter(reasons.values())).items())
    whole = ", ".join(name for name, boards in reasons.items() if any(map(needs_whole, boards.values())))
    hint = f" With {PAPERS_SETTING} in [job], as in papers, all train the whole model of {whole}." if whole else ""
    return f"{counts}, such as {example}: {reason.partition('. ')[0]}.{hint}"


def plan_note(runs: Sequence[Record]) -> str:
    """How many boards each strategy would give more than their plans let it, one of them, and which runs have no plans;
    empty if there is neither."""
    notes: dict[str, str] = {}
    for run in runs:
        strategy = str(run.job.get("strategy", run.title))
        if narrowed := [d for d in run.devices if d.widths and d.density < d.asked]:
            example = f"{narrowed[0].name} to {narrowed[0].density:.3g} of the model instead of {narrowed[0].asked:.3g}"
            notes[strategy] = f"Plans narrow {quantity(len(narrowed), 'board')} of {strategy}, such as {example}."
    if unplanned := [*dict.fromkeys(run.title for run in runs if run.job.get("ignores_plans"))]:
        notes[""] = f"Without boards' plans, as in papers: {first_few(unplanned)}."
    return " ".join(notes.values())
