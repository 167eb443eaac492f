"""Several runs on one page: their curves, final results, and the cost of a target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedprune.core.errors import StorageError
from fedprune.core.text import quantity
from fedprune.output import page
from fedprune.output.tables import Column, print_table
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.record import Record, beside, measured_names, shown
from fedprune_server.simulation.results.report import TAIL, html_table, markdown_table
from fedprune_server.simulation.results.run_folder import RECORD

PAGE = "comparison.html"

_MOST_VALUES = 5


def read_runs(places: Sequence[Path]) -> tuple[Record, ...]:
    """Runs from their folders or `metrics.json` files; equal titles are distinguished by path.

    Args:
        places: Folders or files; of a folder with a reference only the run itself is read.

    Raises:
        StorageError: There is no run, none of its rounds has ended, or they measure different things.
    """
    runs = [(p, Record.load(p / RECORD.format("") if p.is_dir() else p)) for p in places]
    for place, run in runs:
        if not run.rounds:
            raise StorageError(f"the run in {place} has no finished round")
        if run.measure != runs[0][1].measure:
            raise StorageError(f"the run in {place} measures {run.measure}", expected=runs[0][1].measure)
    titles = [run.title for _, run in runs]
    named = [
        run if titles.count(run.title) == 1 else replace(run, title=f"{_place(place)} ({run.title})")
        for place, run in runs
    ]
    return tuple(named)


def final_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Final results, means over the last rounds; the first row is the header."""
    kind = runs[0].measure
    own = [f"{kind}_{m}" for m in beside(runs)]
    names = measured_names(runs)
    head = ("run", "rounds", "seconds", "MB down", "MB up", "training TMACs", f"local {kind}", f"global {kind}")
    rows = [(*head, *(f"local {m.partition('_')[2]}" for m in own), *names)]
    for run in runs:
        local, whole = run.final(TAIL)
        more = [_tail(run.own_means(m)) for m in own] + [_tail(run.measured_values(n)) for n in names]
        rows.append(
            (
                run.title,
                str(len(run.rounds)),
                f"{run.last.at:,.0f}",
                f"{run.last.down / 1e6:,.2f}",
                f"{run.last.up / 1e6:,.2f}",
                f"{run.macs() / 1e12:.3g}" if run.macs() else "–",
                *(shown(v, kind) for v in (local, whole, *more)),
            )
        )
    return rows


def target_rows(runs: Sequence[Record], target: float) -> list[tuple[str, ...]]:
    """Cost until each run's global model reached a target; the first row is the header.

    Speed-up is the first run's simulated time over each run's.
    """
    reached = [run.reached(target, run.global_values()) for run in runs]
    rows: list[tuple[str, ...]] = [("run", "round", "seconds", "speed-up", "MB down and up", "training TMACs")]
    first = reached[0]
    for run, row in zip(runs, reached, strict=True):
        if row is None:
            rows.append((run.title, "never", "–", "–", "–", "–"))
            continue
        macs = sum(r.macs for r in run.rounds if r.round <= row.round)
        rows.append(
            (
                run.title,
                str(row.round),
                f"{row.at:,.0f}",
                f"{first.at / row.at:.2f}" if first is not None and row.at else "–",
                f"{(row.down + row.up) / 1e6:,.2f}",
                f"{macs / 1e12:.3g}" if macs else "–",
            )
        )
    return rows


def print_comparison(runs: Sequence[Record], targets: Sequence[float] = ()) -> None:
    """Print the tables: fitted to a terminal, as Markdown elsewhere."""
    tables = [("", final_rows(runs)), *((_target(runs[0], t), target_rows(runs, t)) for t in targets)]
    for number, (title, (head, *rows)) in enumerate(tables):
        if number:
            print(f"\n{title}")
        if sys.stdout.isatty():
            print_table([_column(n) for n in head], rows)
        else:
            print(markdown_table([head, *rows]))


def _column(title: str) -> Column:
    """A column of the printed tables; the run and its result stay at any width."""
    if title == "run":
        return Column(title, wrap=16)
    stays = title in ("round", "seconds", "speed-up") or title.startswith(("local ", "global "))
    return Column(title, right=True, drop=0 if stays else _DROPS.get(title, 1), wrap=8 if stays else 0)


_DROPS = {"training TMACs": 3, "rounds": 4}


def write_comparison(folder: Path, runs: Sequence[Record], targets: Sequence[float] = ()) -> Path:
    """Write `comparison.html`, a self-contained page, and `comparison.md`; the first run is the baseline.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = [("Results", final_rows(runs)), *((_target(runs[0], t), target_rows(runs, t)) for t in targets)]
    tail = min(TAIL, max(len(r.rounds) for r in runs))
    kind = runs[0].measure
    intro = (
        f"{quantity(len(runs), 'run')}. {'Losses' if kind == 'loss' else 'Accuracies'} of the table are means over "
        f"the last {quantity(tail, 'round')}. Local {kind} is that of the model that a device serves, on its own test "
        "data, as measured last, every device counting alike."
    )
    title = "Runs compared"
    parts = [
        page.paragraph(intro),
        *(page.section(name, html_table(rows)) for name, rows in tables),
        page.section("Learning", charts.curves(runs)),
        page.section("Data of the devices", runs[0].partition.heat_map()),
        *(page.section(f"Channels over the rounds: {run.title}", charts.coverage_map(run)) for run in runs),
    ]
    (folder / PAGE).write_text(page.document(title, parts, _shared(runs)), encoding="utf-8")
    lines = [f"# {title}", intro, *(f"## {name}\n\n{markdown_table(rows)}" for name, rows in tables)]
    lines.append(f"Charts are in [{PAGE}]({PAGE}).")
    (folder / "comparison.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return folder / PAGE


def _shared(runs: Sequence[Record]) -> dict[str, str]:
    """The header: each fact with the runs' values."""
    found = [run.facts() for run in runs]
    values = {key: list(dict.fromkeys(f[key] for f in found if f[key])) for key in found[0]}
    return {k: ", ".join(v) if len(v) <= _MOST_VALUES else f"{len(v)} different" for k, v in values.items()}


def _tail(values: Sequence[float | None]) -> float | None:
    known = [v for v in values[-TAIL:] if v is not None]
    return sum(known) / len(known) if known else None


def _target(run: Record, target: float) -> str:
    return f"Until the global model's {run.measure} was {shown(target, run.measure)}"


def _place(place: Path) -> str:
    return (place if place.suffix != ".json" else place.parent).name or str(place)
