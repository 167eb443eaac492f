"""Which boards a run's results are of: scores of different boards can't be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from fedprune.coordination.width_planner import WHOLE_HINT
from fedprune.core.text import first_few, quantity
from fedprune_server.simulation.results.record import DeviceRow, Record

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
    return _texts_of_boards(runs, lambda d: "" if d.widths else d.excluded)


def _texts_of_boards(runs: Iterable[Record], text: Callable[[DeviceRow], str]) -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = {}
    for run in runs:
        boards = {d.name: said for d in run.devices if (said := text(d))}
        texts.setdefault(str(run.job.get("strategy", run.title)), {}).update(boards)
    return {strategy: boards for strategy, boards in texts.items() if boards}


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
    """How many boards get less than each strategy asks for, by their plans, and which runs have no plans; or empty."""

    def lowered(d: DeviceRow) -> str:
        return f"{d.name}: {d.density:.3g} instead of {d.asked:.3g}" if d.widths and d.density < d.asked else ""

    notes = [
        f"Plans give {quantity(len(boards), 'board')} less than {name} asks for, such as {min(boards.values())}."
        for name, boards in _texts_of_boards(runs, lowered).items()
    ]
    if unplanned := [*dict.fromkeys(run.title for run in runs if run.job.get("ignores_plans"))]:
        notes.append(f"Without boards' plans, as in papers: {first_few(unplanned)}.")
    return " ".join(notes)
