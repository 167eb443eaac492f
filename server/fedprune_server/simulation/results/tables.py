"""The results of runs as tables: for pages, for the terminal, and as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedprune.core.text import first_few, quantity
from fedprune.jobs.job import NO_UPDATE_LIMITS
from fedprune.output.document import Document, Table
from fedprune.output.tables import Column
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.simulation.results.differences import board_gains, score_difference_text
from fedprune_server.simulation.results.record import Record, last_mean, measured_moments, measured_names, score_text

TAIL_ROUNDS = 5  # rounds in a final mean: single rounds of a small test set are noisy
MAX_RESULT_ROWS = 1000  # devices in a table

# Columns of text; the others hold numbers.
_TEXT_COLUMNS = ("", "at most", "run", "variant", "device", "profile", "trains on", "bound by", "why not")

_DROP_ORDER = {"training TMACs": 3, "rounds": 4}


def result_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows as a table, of which only the first `MAX_RESULT_ROWS` are shown; the first row is the header."""
    header, body = rows[0], rows[1:]
    if len(body) > MAX_RESULT_ROWS:
        body = [*body[:MAX_RESULT_ROWS], (f"and {len(body) - MAX_RESULT_ROWS:,} more", *[""] * (len(header) - 1))]
    return Table([_column(title) for title in header], body)


def _column(title: str) -> Column:
    """A column. A narrow terminal drops others before the run and its result."""
    if title in _TEXT_COLUMNS:
        return Column(title, min_width=16 if title == "run" else 0)
    keeps_width = title in ("round", "seconds", "speed-up") or title.startswith(("local ", "global "))
    return Column(
        title,
        is_right_aligned=True,
        drop_order=0 if keeps_width else _DROP_ORDER.get(title, 1),
        min_width=8 if keeps_width else 0,
    )


def final_figures(run: Record, runs: Sequence[Record] = ()) -> dict[str, Any]:
    """A run's results: its costs in all, and its measures as means over the last rounds; None without a measurement.

    If a run of `local` with its seed is among `runs`, they include the boards' latest gains over training alone.
    """
    kind, gains = run.measure, list(board_gains(run, runs).values())
    local_score, global_score = run.final(TAIL_ROUNDS)
    best = run.best
    return {
        "run": run.title,
        "model": run.last.model,
        "rounds": len(run.rounds),
        "mean_rounds": min(TAIL_ROUNDS, len(run.rounds)),  # the last ones, over which the measures below are means
        "ended_early": run.ended_early or None,
        "seconds": run.last.elapsed_s,
        "bytes_down": run.last.down,
        "bytes_up": run.last.up,
        "training_macs": run.macs() or None,
        f"local_{kind}": finite_or_none(local_score),
        f"global_{kind}": finite_or_none(global_score),
        f"worst_local_{kind}": last_mean(run.worst_locals(), TAIL_ROUNDS),
        "board_std": last_mean(run.local_deviations(), TAIL_ROUNDS),
        **({"gain_over_local": fmean(gains), "gaining_boards": sum(gain > 0 for gain in gains)} if gains else {}),
        f"best_global_{kind}": None if best is None else best.metrics[kind],
        "best_round": None if best is None else best.round,
        "best_model": None if best is None else best.model,
        **{f"{kind}_{m}": last_mean(run.own_means(f"{kind}_{m}"), TAIL_ROUNDS) for m in measured_moments([run])},
        **{name: last_mean(run.measured_values(name), TAIL_ROUNDS) for name in measured_names([run])},
        **({EPSILON: run.epsilon, "delta": run.job["privacy"]["delta"]} if run.is_private else {}),
        **dict(zip(("updates_limited", "updates"), run.count_limited, strict=True)),
    }


def finite_or_none(value: float) -> float | None:
    """A score for JSON: None if it is not finite, which means that nothing was measured."""
    return value if math.isfinite(value) else None


def final_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Final results: measures as means over the last rounds, amounts and privacy costs in all, and gains of the boards
    over training alone, as measured last; the first row is the header."""
    cells_of_runs = [_final_cells(run, runs) for run in runs]
    return drop_empty_columns([tuple(cells_of_runs[0]), *(tuple(cells.values()) for cells in cells_of_runs)])


def drop_empty_columns(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Drop the columns of a table that are empty below the header."""
    filled_columns = [i for i in range(len(rows[0])) if not i or any(row[i] not in ("", "–") for row in rows[1:])]
    return [tuple(row[i] for i in filled_columns) for row in rows]


def _final_cells(run: Record, runs: Sequence[Record]) -> dict[str, str]:
    """A run's row of `final_rows` by title; – for what wasn't measured."""
    kind, figures = run.measure, final_figures(run, runs)
    limited, updates = run.count_limited
    gains = board_gains(run, runs).values()

    def scores(values: Mapping[str, float | None]) -> dict[str, str]:
        return {title: score_text(value, run.metric) for title, value in values.items()}

    best = scores({"": figures[f"best_global_{kind}"] if any(len(r.rounds) > 1 for r in runs) else None})[""]
    boards = {f"worst local {kind}": figures[f"worst_local_{kind}"], "std over boards": figures["board_std"]}
    return {
        "run": run.title,
        "rounds": f"{len(run.rounds)} of {run.job['rounds']}" if run.ended_early else str(len(run.rounds)),
        "seconds": f"{figures['seconds']:,.0f}",
        **{f"MB {way}": f"{figures[f'bytes_{way}'] / 1e6:,.2f}" for way in ("down", "up")},
        "training TMACs": tera_macs_text(figures["training_macs"]),
        **scores({f"{side} {kind}": figures[f"{side}_{kind}"] for side in ("local", "global")}),
        f"best global {kind} (round)": best if best == "–" else f"{best} ({figures['best_round']})",
        **(scores(boards) if len(run.latest) > 1 else dict.fromkeys(boards, "–")),
        "gain over local": score_difference_text(run.metric, fmean(gains) if gains else None),
        "boards that gain": f"{sum(gain > 0 for gain in gains)} of {len(gains)}" if gains else "–",
        **scores({f"local {m}": last_mean(run.own_means(f"{kind}_{m}"), TAIL_ROUNDS) for m in measured_moments(runs)}),
        **scores({name: figures.get(name) for name in measured_names(runs)}),
        **{key: "–" if (cost := figures.get(key)) is None else f"{cost:.3g}" for key in (EPSILON, "delta")},
        "updates limited": f"{limited:,} of {updates:,}" if updates and any(r.count_limited[0] for r in runs) else "–",
    }


def tail_note(runs: Sequence[Record]) -> str:
    """Which rounds the means in `final_rows` are over, and which runs were without limits on updates."""
    rounds = quantity(min(TAIL_ROUNDS, max(len(run.rounds) for run in runs)), "round")
    best = ", except the best, which is that of one round" if any(len(run.rounds) > 1 for run in runs) else ""
    unlimited = [run.title for run in runs if not any(run.job.get(name, True) for name in NO_UPDATE_LIMITS)]
    limits = f" Without the server's limits on updates, as in papers: {first_few(unlimited)}." if unlimited else ""
    return f"Figures of {runs[0].metric.title} in the table are means over the last {rounds}{best}.{limits}"


def tera_macs_text(macs: float | None) -> str:
    return f"{macs / 1e12:.3g}" if macs else "–"


def print_results(runs: Sequence[Record]) -> None:
    """Print the table of final results, and over how many rounds its means are."""
    print_rows(final_rows(runs))
    print(f"\n{tail_note(runs)}")


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table, whose first row is the header: fitted to a terminal, as Markdown elsewhere."""
    if sys.stdout.isatty():
        result_table(rows).print()
    else:
        print(result_table(rows).to_markdown())


def write_page(document: Document, path: Path) -> Path:
    """Write a document as a self-contained page, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document.to_html(), encoding="utf-8")
    return path
