"""Curves and tables of runs as a paper has them: SVG and PDF, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, MissingExtraError
from fedprune_server.simulation.results import charts, tables
from fedprune_server.simulation.results.comparison import group_by_seed, variant_figures, variant_rows
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.rows import csv_bytes

FIGURE_SUFFIXES, TABLE_SUFFIXES = (".svg", ".pdf", ".png"), (".tex", ".csv")

_AXES_INCHES = (4.5, 3.0)

# Characters that LaTeX reads as commands, and those of tables that its fonts may lack.
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"–": "--", "−": "$-$", "±": r"$\pm$", "Δ": r"$\Delta$"}
)


def save_figure(runs: Sequence[Record], path: Path, along: str = "round") -> Path:
    """Draw the global and the mean local measure of runs; of runs that differ in their seeds alone the mean, in a band
    of one standard deviation. The path's suffix names the format; `along` is `round`, `MB` or `seconds`.

    Raises `ConfigError` for another format or axis, `MissingExtraError` without matplotlib, and `StorageError` if the
    disk fails.
    """
    axes_of_figure = dict(charts.X_AXES)
    _check("path", path.suffix, FIGURE_SUFFIXES)
    _check("along", along, tuple(axes_of_figure))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib", extra="figures") from error

    groups = group_by_seed(runs) or {run.title: [run] for run in runs}
    curves = charts.curve_rows(runs)[:2]
    width, height = _AXES_INCHES
    figure = Figure(figsize=(width * max(1, len(curves)), height), layout="constrained")
    for i, (title, metric, values) in enumerate(curves):
        axes, scale = figure.add_subplot(1, len(curves), i + 1), 100.0 if metric.is_share else 1.0
        for name, group in groups.items():
            points = list(_points(group, values, axes_of_figure[along], scale))
            x, y, spread = zip(*points, strict=True) if points else ((), (), ())
            axes.plot(x, y, label=name.replace("$", r"\$"))
            low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.2, linewidth=0)
        axes.set(title=title, xlabel=along, ylabel=f"{metric.title}{' (%)' * metric.is_share}")
        axes.grid(alpha=0.3)
        if not i:
            axes.legend(fontsize="small")
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
    _check("path", path.suffix, TABLE_SUFFIXES)
    variants = group_by_seed(runs)
    if path.suffix == ".csv":
        figures = variant_figures(variants) if variants else [tables.final_figures(run, runs) for run in runs]
        write_atomically(path, csv_bytes(figures))
    else:
        rows = variant_rows(variants) if variants else tables.final_rows(runs)
        write_atomically(path, _latex_table(rows).encode())
    return path


def _latex_table(rows: Sequence[tuple[str, ...]]) -> str:
    header, *body = (" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows)
    columns = "l" + "r" * (len(rows[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", ""])


def _check(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(name, expected=f"one of {', '.join(allowed)}", got=repr(value))
