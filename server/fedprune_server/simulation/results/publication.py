"""Curves and tables of runs as a paper has them: SVG and PDF, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import MissingExtraError
from fedprune.core.validation import check_items, check_number, check_word
from fedprune_server.simulation.results import charts, tables
from fedprune_server.simulation.results.comparison import (
    group_by_seed,
    name_groups,
    variant_figures,
    variant_note,
    variant_rows,
)
from fedprune_server.simulation.results.coverage import coverage_mark
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.rows import csv_bytes

FIGURE_SUFFIXES, TABLE_SUFFIXES = (".svg", ".pdf", ".png"), (".tex", ".csv")

_AXES_INCHES, _MAX_INCHES = (4.5, 3.5), 100.0

# Curves are told apart in grey print, too.
_LINE_STYLES, _MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
_LINE_SIZES = {"linewidth": 1.2, "markersize": 4, "elinewidth": 0.8, "capsize": 2}
_MAX_BARS = 5  # of a curve; markers, too

# Characters that LaTeX reads as commands, and those of tables that its fonts may lack.
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "−": "$-$", "±": r"$\pm$", "Δ": r"$\Delta$"}
)


def save_figure(
    runs: Sequence[Record],
    path: Path,
    along: str = "round",
    *,
    size: Sequence[float] = (),
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Draw the global and the mean local measure of runs; of runs that differ in their seeds alone the mean, with bars
    of one standard deviation at some rounds. The path's suffix names the format.

    Raises `ConfigError` for another format, axis, curve or size, `MissingExtraError` without matplotlib, and
    `StorageError` if the disk fails.

    Args:
        along: `round`, `MB` or `seconds`.
        size: Width and height in inches.
        labels: The curves to draw, by their names, and what the legend calls them; by default all by their names.
    """
    axes_of_figure, groups = dict(charts.X_AXES), group_by_seed(runs) or name_groups([[run] for run in runs])
    labels = labels or {name: name for name in groups}
    check_word("path", path.suffix, FIGURE_SUFFIXES)
    check_word("along", along, tuple(axes_of_figure))
    for name in labels:
        check_word("labels", name, tuple(groups))
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib", extra="figures") from error

    curves = charts.score_curves([run for name in labels for run in groups[name]])
    sides = size or (_AXES_INCHES[0] * max(1, len(curves)), _AXES_INCHES[1])
    width, height = check_items("size", sides, 2, "numbers", min_items=2)
    for inches in (width, height):
        check_number("size", inches, 0, _MAX_INCHES, above=True)
    figure = Figure(figsize=(width, height), layout="constrained")
    entries: dict[str, Any] = {}
    for i, (title, metric, values) in enumerate(curves):
        axes, scale = figure.add_subplot(1, len(curves), i + 1), 100.0 if metric.is_share else 1.0
        for j, (name, label) in enumerate(labels.items()):
            if points := list(_points(groups[name], values, axes_of_figure[along], scale)):
                x, y, spread = zip(*points, strict=True)
                # Few bars, each curve's at rounds of its own: those of many curves would hide each other.
                step = -(-len(x) // _MAX_BARS)
                look: dict[str, Any] = {"fmt": f"C{j % 10}{_MARKERS[j % 7]}{_LINE_STYLES[j % 4]}", **_LINE_SIZES}
                if any(spread):
                    look |= {"yerr": spread, "errorevery": (j % step, step)}
                entries[(label + coverage_mark(groups[name][0])).replace("$", r"\$")] = axes.errorbar(
                    x, y, markevery=(j % step, step), **look
                )
        if along == "round":
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set(xlabel=along, ylabel=f"{title}{' (%)' * metric.is_share}")
        axes.grid(alpha=0.3)
    columns = max(1, int(width / 1.5))  # inches of an entry
    figure.legend([*entries.values()], [*entries], loc="outside lower center", ncols=columns, fontsize="small")
    with storage_errors(f"can't write {path}"):
        figure.savefig(path)
    return path


def _points(
    group: Sequence[Record], values: charts.RoundValues, along: charts.RoundPosition, scale: float
) -> Iterator[tuple[float, float, float]]:
    """Mean position, mean value and standard deviation of each round that all runs have measured."""
    for rounds, scores in zip(zip(*(run.rounds for run in group)), zip(*map(values, group))):  # noqa: B905  shortest
        measured = [score * scale for score in scores if score is not None]
        if len(measured) == len(scores):
            yield fmean(map(along, rounds)), fmean(measured), stdev(measured) if len(measured) > 1 else 0.0


def save_table(runs: Sequence[Record], path: Path) -> Path:
    """Write the results of runs: as text for LaTeX with booktabs, as numbers in CSV; of runs with several seeds a row
    per variant. Raises `ConfigError` for another suffix, and `StorageError` if the disk fails."""
    check_word("path", path.suffix, TABLE_SUFFIXES)
    variants = group_by_seed(runs)
    if path.suffix == ".csv":
        figures = variant_figures(variants) if variants else [tables.final_figures(run, runs) for run in runs]
        write_atomically(path, csv_bytes(figures))
    else:
        rows = variant_rows(variants) if variants else tables.final_rows(runs)
        # Short headers: the comment names the measure.
        header = tuple(title.replace(f" {runs[0].measure}", "").removeprefix("training ") for title in rows[0])
        notes = [*([variant_note(variants)] if variants else []), tables.tail_note(runs), r"\usepackage{booktabs}"]
        write_atomically(path, _latex_table([header, *rows[1:]], notes).encode())
    return path


def _latex_table(rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    header, *body = (" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows)
    comments, columns = "".join(f"% {note}\n" for note in notes), "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return comments + "\n".join([*lines, r"\end{tabular}", ""])
