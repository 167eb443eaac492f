"""Several runs next to each other: their results, costs and curves, as tables, Markdown and a self-contained page."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedprune.core.errors import StorageError
from fedprune.core.text import amount, quantity
from fedprune.output.document import Block, Document, Drawing
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.record import Record, also_measured, measured_names, shown
from fedprune_server.simulation.results.report import TAIL, limited_part, rounds_done, table, write_document
from fedprune_server.simulation.results.run_folder import RECORD

PAGE = "comparison.html"

EQUAL_COST = "At equal cost: each run's last measured round before it had spent more than the run that spent least"

_MOST_VALUES = 5

_COSTS: dict[str, Callable[[Record], list[float]]] = {
    "rounds": lambda run: [row.round for row in run.rounds],
    "training_macs": lambda run: list(accumulate(row.macs for row in run.rounds)),
    "bytes": lambda run: [row.down + row.up for row in run.rounds],
    "seconds": lambda run: [row.at for row in run.rounds],
}
"""What a run had spent at the end of each of its rounds, in all."""


def read_runs(places: Sequence[Path]) -> tuple[Record, ...]:
    """Runs from their folders or `metrics.json` files; equal titles are distinguished by path.

    Args:
        places: Folders or files; of a folder with a reference only the run itself is read.

    Raises:
        StorageError: There is no run, none of its rounds has ended, or they measure different things.
    """
    runs = [(p, Record.load(p / RECORD if p.is_dir() else p)) for p in places]
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


def final_figures(run: Record) -> dict[str, str | float | None]:
    """A run's results: bytes, MACs, simulated seconds and privacy cost in all, and measures as means over the last
    rounds; None where there is no measurement."""
    kind = run.measure
    local, whole = run.final(TAIL)
    best = run.best
    return {
        "run": run.title,
        "model": run.last.model,
        "rounds": len(run.rounds),
        "ended_early": run.ended_early or None,
        "seconds": run.last.at,
        "bytes_down": run.last.down,
        "bytes_up": run.last.up,
        "training_macs": run.macs() or None,
        f"local_{kind}": finite(local),
        f"global_{kind}": finite(whole),
        f"best_global_{kind}": None if best is None else best.metrics[kind],
        "best_round": None if best is None else best.round,
        "best_model": None if best is None else best.model,
        **{f"{kind}_{m}": _tail(run.own_means(f"{kind}_{m}")) for m in also_measured([run])},
        **{name: _tail(run.measured_values(name)) for name in measured_names([run])},
        **({EPSILON: run.epsilon, "delta": run.job["privacy"]["delta"]} if run.private else {}),
        **dict(zip(("updates_limited", "updates"), run.count_limited, strict=True)),
    }


def variant_figures(variants: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Means over each variant's runs of what they were judged by, and standard deviations where there are several
    runs; of runs that have such a figure."""
    found = []
    for name, runs in variants.items():
        row: dict[str, Any] = {"variant": name, "runs": len(runs)}
        for side, place in (("local", 0), ("global", 1)):
            values = [v for v in (run.final(TAIL)[place] for run in runs) if math.isfinite(v)]
            key = f"{side}_{runs[0].measure}"
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(row)
    return found


def variant_rows(variants: Mapping[str, Sequence[Record]]) -> list[tuple[str, ...]]:
    """The same as a table: mean ± standard deviation; the first row is the header."""
    first = next(iter(variants.values()))[0]
    keys = [f"{side}_{first.measure}" for side in ("local", "global")]

    def cell(row: Mapping[str, Any], key: str) -> str:
        mean, spread = (shown(row[k], first.metric) for k in (key, f"{key}_std"))
        return mean if row[f"{key}_std"] is None else f"{mean} ± {spread}"

    rows: list[tuple[str, ...]] = [("variant", "runs", *(key.replace("_", " ") for key in keys))]
    rows += [(r["variant"], str(r["runs"]), *(cell(r, key) for key in keys)) for r in variant_figures(variants)]
    return rows


def target_figures(run: Record, target: float) -> dict[str, float | None]:
    """Cost until a run's global model reached a target; without a round if it never did."""
    row = run.reached(target)
    if row is None:
        return {"target": target, "round": None, "seconds": None, "bytes": None, "training_macs": None}
    macs = sum(r.macs for r in run.rounds if r.round <= row.round)
    spent = row.down + row.up
    return {"target": target, "round": row.round, "seconds": row.at, "bytes": spent, "training_macs": macs or None}


def equal_cost_figures(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """For each cost, the largest amount that all runs have spent, and every run's measures after its last measured
    round that ended within it; without a round where none did. Costs that a run didn't count are left out."""
    found = []
    for cost, spent_by in _COSTS.items():
        spent = [spent_by(run) for run in runs]
        most = min(amounts[-1] for amounts in spent)
        for run, amounts in zip(runs, spent, strict=True) if most else ():
            whole, local = run.global_values(), run.mean_locals()
            measured = [i for i, values in enumerate(zip(whole, local, strict=True)) if values != (None, None)]
            if any(value is not None for value in whole):
                measured = [i for i in measured if whole[i] is not None]
            at = max((i for i in measured if amounts[i] <= most), default=None)
            found.append(
                {
                    "cost": cost,
                    "amount": most,
                    "run": run.title,
                    "round": None if at is None else run.rounds[at].round,
                    "spent": None if at is None else amounts[at],
                    f"local_{run.measure}": None if at is None else local[at],
                    f"global_{run.measure}": None if at is None else whole[at],
                }
            )
    return found


def equal_cost_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """The same as a table; the first row is the header."""
    kind, metric = runs[0].measure, runs[0].metric
    rows: list[tuple[str, ...]] = [("at most", "run", "round", "spent", f"local {kind}", f"global {kind}")]
    for figures in equal_cost_figures(runs):
        number = figures["round"]
        spent = "–" if number is None else _amount(figures["spent"], figures["cost"])
        scores = (shown(figures[f"{side}_{kind}"], metric) for side in ("local", "global"))
        limit = _amount(figures["amount"], figures["cost"])
        rows.append((limit, figures["run"], "none" if number is None else str(number), spent, *scores))
    return rows


def _amount(value: float, cost: str) -> str:
    match cost:
        case "rounds":
            return quantity(int(value), "round")
        case "training_macs":
            return f"{_tmacs(value)} TMACs"
        case _:
            return amount(value, "bytes" if cost == "bytes" else "s")


def finite(value: float) -> float | None:
    """A score as JSON may have it: None where nothing was measured."""
    return value if math.isfinite(value) else None


def final_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Final results: measures as means over the last rounds, amounts and privacy costs in all; the first row is the
    header."""
    kind, metric = runs[0].measure, runs[0].metric
    private = (EPSILON, "delta") if any(run.private for run in runs) else ()
    own = [f"{kind}_{m}" for m in also_measured(runs)]
    names = measured_names(runs)
    limits = ("updates limited",) if any(run.count_limited[0] for run in runs) else ()
    head = ("run", "rounds", "seconds", "MB down", "MB up", "training TMACs", f"local {kind}", f"global {kind}")
    rows = [(*head, *(f"local {m.partition('_')[2]}" for m in own), *names, *private, *limits)]
    for run in runs:
        found: dict[str, Any] = final_figures(run) | {key: _tail(run.own_means(key)) for key in own}
        measures = (found.get(key) for key in (f"local_{kind}", f"global_{kind}", *own, *names))
        rows.append(
            (
                run.title,
                rounds_done(run),
                f"{found['seconds']:,.0f}",
                *(f"{found[key] / 1e6:,.2f}" for key in ("bytes_down", "bytes_up")),
                _tmacs(found["training_macs"]),
                *(shown(value, metric) for value in measures),
                *("–" if (cost := found.get(key)) is None else f"{cost:.3g}" for key in private),
                *(limited_part(run) for _ in limits),
            )
        )
    return rows


def tail_note(runs: Sequence[Record]) -> str:
    """Over which rounds the means in `final_rows` are."""
    rounds = quantity(min(TAIL, max(len(run.rounds) for run in runs)), "round")
    return f"Figures of {runs[0].metric.title} in the table are means over the last {rounds}."


def _tmacs(macs: float | None) -> str:
    return f"{macs / 1e12:.3g}" if macs else "–"


def target_rows(runs: Sequence[Record], target: float) -> list[tuple[str, ...]]:
    """Cost until each run's global model reached a target; the first row is the header.

    Speed-up is the first run's simulated time over each run's.
    """
    reached: list[dict[str, Any]] = [target_figures(run, target) for run in runs]
    rows: list[tuple[str, ...]] = [("run", "round", "seconds", "speed-up", "MB down and up", "training TMACs")]
    first = reached[0]["seconds"]
    for run, found in zip(runs, reached, strict=True):
        if found["round"] is None:
            rows.append((run.title, "never", "–", "–", "–", "–"))
            continue
        rows.append(
            (
                run.title,
                str(found["round"]),
                f"{found['seconds']:,.0f}",
                f"{first / found['seconds']:.2f}" if first is not None and found["seconds"] else "–",
                f"{found['bytes'] / 1e6:,.2f}",
                _tmacs(found["training_macs"]),
            )
        )
    return rows


def print_comparison(
    runs: Sequence[Record], targets: Sequence[float] = (), variants: Mapping[str, Sequence[Record]] | None = None
) -> None:
    """Print the tables: fitted to a terminal, as Markdown elsewhere."""
    for number, (title, rows) in enumerate(_comparison_tables(runs, targets, variants).items()):
        if number:
            print(f"\n{title}")
        print_rows(rows)


def print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table, whose first row is the header: fitted to a terminal, as Markdown elsewhere."""
    if sys.stdout.isatty():
        table(rows).print()
    else:
        print(table(rows).to_markdown())


def _comparison_tables(
    runs: Sequence[Record], targets: Sequence[float], variants: Mapping[str, Sequence[Record]] | None
) -> dict[str, list[tuple[str, ...]]]:
    measure = runs[0].measure
    reached = {
        f"Until the global model's {measure} was {shown(t, runs[0].metric)}": target_rows(runs, t) for t in targets
    }
    several = {} if not variants else {"Mean ± standard deviation of each variant's runs": variant_rows(variants)}
    equal = {EQUAL_COST: equal_cost_rows(runs)} if len(runs) > 1 else {}
    return {"Results": final_rows(runs), **several, **equal, **reached}


def write_comparison(
    folder: Path,
    runs: Sequence[Record],
    targets: Sequence[float] = (),
    variants: Mapping[str, Sequence[Record]] | None = None,
) -> Path:
    """Write `comparison.html`, a self-contained page, and `comparison.md`; the first run is the baseline. Returns the
    page."""
    kind = runs[0].measure
    intro = (
        f"{quantity(len(runs), 'run')}. {tail_note(runs)} Local {kind} is that of the model "
        "that a device serves, on its own test data, as measured last, every device counting alike. Seconds are "
        "simulated time."
    )
    sections: dict[str, Sequence[Block]] = {
        "": [intro],
        **{title: [table(rows)] for title, rows in _comparison_tables(runs, targets, variants).items()},
        "Learning": [Drawing(charts.curves(runs))],
        "Data of the devices": [Drawing(runs[0].partition.heat_map())],
        **{f"Channels over the rounds: {run.title}": [Drawing(charts.coverage_map(run))] for run in runs},
    }
    write_document(Document("Runs compared", _shared(runs), sections), folder / PAGE, folder / "comparison.md")
    return folder / PAGE


def _shared(runs: Sequence[Record]) -> dict[str, str]:
    """The header: each fact with the runs' values."""
    found = [run.facts() for run in runs]
    values = {key: list(dict.fromkeys(f[key] for f in found if f[key])) for key in found[0]}
    return {k: ", ".join(v) if len(v) <= _MOST_VALUES else f"{len(v)} different" for k, v in values.items()}


def _tail(values: Sequence[float | None]) -> float | None:
    known = [v for v in values[-TAIL:] if v is not None]
    return sum(known) / len(known) if known else None


def _place(place: Path) -> str:
    return (place if place.suffix != ".json" else place.parent).name or str(place)
