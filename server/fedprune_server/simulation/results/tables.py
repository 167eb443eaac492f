"""The results of runs as tables: for pages, for the terminal, and as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fedprune.core.text import first_few, quantity
from fedprune.jobs.job import NO_UPDATE_LIMITS
from fedprune.output.document import Document, Table
from fedprune.output.tables import Column
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.simulation.results.coverage import coverage_mark, left_out_boards, left_out_note, plan_note
from fedprune_server.simulation.results.differences import board_gains, score_difference_text
from fedprune_server.simulation.results.record import Record, last_mean, measured_moments, measured_names, score_text

TAIL_ROUNDS = 5  # rounds in a final mean: single rounds of a small test set are noisy
MAX_RESULT_ROWS = 1000  # devices in a table


@dataclass(frozen=True)
class ResultColumn:
    """A column of results: its figure in JSON and CSV (`key`), its header, and the figure as text, to which `beside`
    adds another one (`over`). Variants have means of it (`is_mean`) and differences in it (`is_compared`)."""

    key: str
    title: str
    text: Callable[[Any], str]
    over: str = ""
    beside: str = " of {:,}"
    is_mean: bool = False
    is_compared: bool = False

    def cell(self, figures: Mapping[str, Any]) -> str:
        """The figure, with its standard deviation over runs or half of its interval; – for what wasn't measured."""
        value, over = figures.get(self.key), figures.get(self.over)
        spread = figures.get(f"{self.key}_std", figures.get(f"{self.key}_half"))
        if value is None or over == 0:
            return "–"
        suffix = "" if spread is None or self.over else f" ± {self.text(spread).removeprefix('+')}"
        return self.text(value) + suffix + ("" if over is None else self.beside.format(over))


def column_rows(columns: Sequence[ResultColumn], figures: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each of the figures; the first row is the header."""
    return [tuple(c.title for c in columns), *(tuple(c.cell(row) for c in columns) for row in figures)]


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
    keeps_width = title in ("round", "devices", "seconds", "speed-up") or title.startswith(("local ", "global "))
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
    local_score, global_score = run.final(TAIL_ROUNDS)
    kind, best, gains = run.measure, run.best, board_gains(run, runs).values()
    over_boards = (run.worst_locals(), run.local_deviations()) if len(run.latest) > 1 else ((), ())
    worst_local, board_std = (last_mean(values, TAIL_ROUNDS) for values in over_boards)
    return {
        "run": run.title,
        "model": run.last.model,
        "rounds": len(run.rounds),
        "planned_rounds": run.job["rounds"] if run.ended_early else None,
        "mean_rounds": min(TAIL_ROUNDS, len(run.rounds)),  # the last ones, over which the measures below are means
        "ended_early": run.ended_early or None,
        "devices": len(run.delivered) or None,  # those whose updates counted, of which the local scores are
        "fleet_devices": len(run.devices),
        "seconds": run.last.elapsed_s,
        "bytes_down": run.last.down,
        "bytes_up": run.last.up,
        "training_macs": run.macs() or None,
        f"local_{kind}": finite_or_none(local_score),
        f"global_{kind}": finite_or_none(global_score),
        f"worst_local_{kind}": worst_local,
        "board_std": board_std,
        **({"gain_over_local": fmean(gains), "compared_boards": len(gains)} if gains else {}),
        **({"gaining_boards": sum(gain > 0 for gain in gains)} if gains else {}),
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


def result_columns(runs: Sequence[Record]) -> list[ResultColumn]:
    """The columns of results, for runs and variants; `devices` only if a run covers fewer than its fleet has."""
    kind, metric = runs[0].measure, runs[0].metric
    score, gain, column = partial(score_text, metric=metric), partial(score_difference_text, metric), ResultColumn
    compared = partial(ResultColumn, text=score, is_mean=True, is_compared=True)
    megabytes = partial(ResultColumn, text=megabytes_text, is_mean=True)
    is_partial = any(map(coverage_mark, runs))
    has_best = any(len(run.rounds) > 1 for run in runs)
    are_limited = any(run.count_limited[0] for run in runs)
    return [
        column("rounds", "rounds", "{:d}".format, "planned_rounds"),
        *[column("devices", "devices", lambda count: f"{count:,.1f}".removesuffix(".0"), "fleet_devices", is_mean=True)]
        * is_partial,
        column("seconds", "seconds", "{:,.0f}".format),
        *(megabytes(f"bytes_{way}", f"MB {way}") for way in ("down", "up")),
        column("training_macs", "training TMACs", tera_macs_text, is_mean=True),
        *(compared(f"{side}_{kind}", f"{side} {kind}") for side in ("local", "global")),
        *[column(f"best_global_{kind}", f"best global {kind} (round)", score, "best_round", " ({})")] * has_best,
        compared(f"worst_local_{kind}", f"worst local {kind}"),
        column("board_std", "std over boards", score),
        column("gain_over_local", "gain over local", gain, is_mean=True),
        column("gaining_boards", "boards that gain", "{:,}".format, "compared_boards"),
        *(column(f"{kind}_{moment}", f"local {moment}", score) for moment in measured_moments(runs)),
        *(column(name, name, score) for name in measured_names(runs)),
        *(column(cost, cost, "{:.3g}".format) for cost in (EPSILON, "delta")),
        *[column("updates_limited", "updates limited", "{:,}".format, "updates")] * are_limited,
    ]


def final_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Final results: measures as means over the last rounds, amounts and privacy costs in all, and gains of the boards
    over training alone, as measured last; the first row is the header."""
    columns, figures = [ResultColumn("run", "run", str), *result_columns(runs)], [final_figures(r, runs) for r in runs]
    return drop_empty_columns(column_rows(columns, figures))


def drop_empty_columns(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Drop the columns of a table that are empty below the header."""
    filled_columns = [i for i in range(len(rows[0])) if not i or any(row[i] not in ("", "–") for row in rows[1:])]
    return [tuple(row[i] for i in filled_columns) for row in rows]


def tail_note(runs: Sequence[Record]) -> str:
    """Which rounds means in `final_rows` are over, and which runs narrowed boards, left some out or had no limits."""
    rounds = quantity(min(TAIL_ROUNDS, max(len(run.rounds) for run in runs)), "round")
    best = ", except the best, which is that of one round" if any(len(run.rounds) > 1 for run in runs) else ""
    unlimited = dict.fromkeys(r.title for r in runs if not any(r.job.get(name, True) for name in NO_UPDATE_LIMITS))
    limits = f" Without the server's limits on updates, as in papers: {first_few([*unlimited])}." if unlimited else ""
    means = f"Figures of {runs[0].metric.title} in the table are means over the last {rounds}{best}.{limits}"
    return " ".join(filter(None, (means, left_out_note(left_out_boards(runs)), plan_note(runs))))


def megabytes_text(count: float) -> str:
    return f"{count / 1e6:,.2f}"


def tera_macs_text(macs: float) -> str:
    return f"{macs / 1e12:.3g}"


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
