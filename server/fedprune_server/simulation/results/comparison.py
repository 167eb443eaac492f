"""Several runs next to each other: their results, costs and curves, as tables, Markdown and a self-contained page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from fedprune.core.errors import StorageError
from fedprune.core.text import amount, quantity
from fedprune.output.document import Block, Document, Drawing
from fedprune_server.simulation.results import charts, tables
from fedprune_server.simulation.results.coverage import on_common_boards, with_coverage_marks
from fedprune_server.simulation.results.differences import board_gains, half_interval, score_difference_text
from fedprune_server.simulation.results.record import Record, score_text
from fedprune_server.simulation.results.run_folder import RECORD_FILE, REFERENCE_FOLDER
from fedprune_server.simulation.results.tables import ResultColumn

PAGE_FILE = "comparison.html"

EQUAL_COST = "At equal cost: each run's last measured round before it had spent more than the run that spent least"

_MAX_VALUES = 5

# What a run had spent at the end of each of its rounds, in all.
_COST_READERS: dict[str, Callable[[Record], list[float]]] = {
    "rounds": lambda run: [row.round for row in run.rounds],
    "training_macs": lambda run: list(accumulate(row.macs for row in run.rounds)),
    "bytes": lambda run: [row.down + row.up for row in run.rounds],
    "seconds": lambda run: [row.elapsed_s for row in run.rounds],
}


def read_runs(paths: Sequence[Path]) -> tuple[Record, ...]:
    """Runs from their folders or `metrics.json` files or, by name, a sweep's; equal titles are distinguished by path.

    Of a folder with a reference only the run itself is read. Raises `StorageError` if there is no run, none of its
    rounds has ended, or they measure different things.
    """
    sweeps = [() if (p / RECORD_FILE).exists() else sorted(p.glob(f"*/{RECORD_FILE}")) for p in paths]
    runs_of_sweeps = [[f.parent for f in files if f.parent.name != REFERENCE_FOLDER] for files in sweeps]
    folders = chain.from_iterable(runs or [p] for p, runs in zip(paths, runs_of_sweeps, strict=True))
    runs = [(p, Record.load(p / RECORD_FILE if p.is_dir() else p)) for p in folders]
    for path, run in runs:
        if not run.rounds:
            raise StorageError(f"the run in {path} has no finished round")
        if run.measure != runs[0][1].measure:
            raise StorageError(f"the run in {path} measures {run.measure}", expected=runs[0][1].measure)
    titles = [run.title for _, run in runs]
    return tuple(
        run
        if titles.count(run.title) == 1
        else replace(run, title=f"{(p.parent if p.suffix == '.json' else p).name or p} ({run.title})")
        for p, run in runs
    )


def group_by_seed(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs that differ in their seeds alone, by their names; empty if there are none."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        settings = {k: v for k, v in run.job.items() if k not in ("name", "seed")}
        fleet = [run.partition.settings, sorted(device.name for device in run.devices)]
        groups.setdefault(json.dumps([settings, fleet], sort_keys=True, default=str), []).append(run)
    seeds = [[run.seed for run in group] for group in groups.values()]
    has_variants = max(map(len, seeds), default=0) > 1 and all(len(set(numbers)) == len(numbers) for numbers in seeds)
    return name_groups([*groups.values()]) if has_variants else {}


def name_groups(groups: Sequence[list[Record]]) -> dict[str, list[Record]]:
    """Groups of runs by the title that they alone have, without what a sweep and `SimulatedRun.compare` add; else by
    their strategy, unless others have that, too."""
    strategies = [str(group[0].job.get("strategy")) for group in groups]
    titles = [
        {run.title.removesuffix(f"-{run.seed}").removesuffix(f" ({strategy})") for run in group}
        for group, strategy in zip(groups, strategies, strict=True)
    ]
    named_groups: dict[str, list[Record]] = {}
    for group, title, strategy in zip(groups, titles, strategies, strict=True):
        has_own_title = len(title) == 1 == titles.count(title)
        name = strategy if strategies.count(strategy) == 1 and not has_own_title else min(title)
        named_groups[name if name not in named_groups else f"{name} ({len(named_groups) + 1})"] = group
    return named_groups


def variant_figures(variants: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Means over each variant's runs of their final figures, standard deviations if there are several runs, and mean
    differences of scores from the first variant, paired by seed, with half of their 95 % intervals. Differences of
    local scores are over the boards that both runs have.

    Runs without such a figure are left out.
    """
    runs = list(chain.from_iterable(variants.values()))
    rows: list[dict[str, Any]] = []
    first: dict[int, Record] = {}
    for name, group in variants.items():
        figures = [tables.final_figures(run, runs) for run in group]
        pairs = [on_common_boards(run, first[run.seed]) for run in group if run.seed in first]
        figures_of_pairs = [[tables.final_figures(run) for run in pair] for pair in pairs]
        rows.append(row := {"variant": name, "runs": len(group), "fleet_devices": len(group[0].devices)})
        for column in _variant_columns(variants):
            key = column.key
            values = [value for f in figures if (value := f.get(key)) is not None]
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
            if column.is_compared:
                scores = [(a[key], b[key]) for a, b in figures_of_pairs]
                differences = [a - b for a, b in scores if a is not None and b is not None]
                row[f"{key}_delta"] = statistics.fmean(differences) if differences else None
                row[f"{key}_delta_half"] = half_interval(differences)
        first = first or {run.seed: run for run in group}
    return rows


def _variant_columns(variants: Mapping[str, Sequence[Record]]) -> list[ResultColumn]:
    return [c for c in tables.result_columns(list(chain.from_iterable(variants.values()))) if c.is_mean]


def variant_rows(variants: Mapping[str, Sequence[Record]]) -> list[tuple[str, ...]]:
    """The same as a table: mean ± standard deviation, and Δ ± half of the interval; the first row is the header."""
    text = partial(score_difference_text, next(iter(variants.values()))[0].metric)
    columns = [ResultColumn(key, key, str) for key in ("variant", "runs")]
    for column in _variant_columns(variants):
        columns += [column, ResultColumn(f"{column.key}_delta", f"Δ {column.title}", text)][: 1 + column.is_compared]
    return tables.drop_empty_columns(tables.column_rows(columns, variant_figures(variants)))


def variant_note(variants: Mapping[str, Sequence[Record]]) -> str:
    """What the numbers of `variant_rows` are."""
    counts = sorted({len(runs) for runs in variants.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    mean, interval = f"Mean ± standard deviation over {seeds} seeds; ", ", paired by seed, ± half of its 95 % interval"
    difference = f"Δ: difference from {next(iter(variants))}, of local scores over the boards of both"
    return f"{mean}{difference}{interval}" if counts[-1] > 1 else difference


def board_figures(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """The latest score that each board serves in each run, and its gain over training alone: over the run of `local`
    with the same seed, if there is one."""
    figures: list[dict[str, Any]] = []
    for run in runs:
        gains = board_gains(run, runs)
        for device, score in sorted(run.latest.items()):
            row = {"run": run.title, "seed": run.seed, "device": device, f"local_{run.measure}": score}
            figures.append(row | {"gain_over_local": gains.get(device)})
    return figures


def _board_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """The same as a table with a row per board; the first row is the header."""
    metric, cells = runs[0].metric, {}
    for row in board_figures(runs):
        gain = row["gain_over_local"]
        suffix = "" if gain is None else f" ({score_difference_text(metric, gain)})"
        cells[row["device"], row["run"]] = score_text(row[f"local_{runs[0].measure}"], metric) + suffix
    devices = dict.fromkeys(device for device, _ in cells)
    rows = [(device, *(cells.get((device, run.title), "–") for run in runs)) for device in devices]
    return [("device", *(run.title for run in runs)), *rows]


def target_figures(run: Record, target: float) -> dict[str, float | None]:
    """Cost until a run's global model reached a target; all None if it never did."""
    row = run.first_round_reaching(target)
    if row is None:
        return {"target": target, "round": None, "seconds": None, "bytes": None, "training_macs": None}
    macs = sum(r.macs for r in run.rounds if r.round <= row.round)
    costs = {"seconds": row.elapsed_s, "bytes": row.down + row.up, "training_macs": macs or None}
    return {"target": target, "round": row.round, **costs}


def equal_cost_figures(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """Every run's measures at equal cost, for each kind of cost.

    The cost is the largest that all runs have spent; measures are those of a run's last measured round within it, or
    None without such a round. Costs that a run didn't count are left out.
    """
    figures = []
    for cost, spent_by in _COST_READERS.items():
        costs = [spent_by(run) for run in runs]
        equal_cost = min((amounts[-1] for amounts in costs), default=0)
        # A cost of 0 was not counted, such as MACs on a server of real boards.
        for run, amounts in zip(runs, costs, strict=True) if equal_cost else ():
            global_values, local_values = run.global_values(), run.mean_locals()
            measured_rounds = [
                i for i, values in enumerate(zip(global_values, local_values, strict=True)) if values != (None, None)
            ]
            if any(value is not None for value in global_values):
                measured_rounds = [i for i in measured_rounds if global_values[i] is not None]
            last_round = max((i for i in measured_rounds if amounts[i] <= equal_cost), default=None)
            keys = ("round", "spent", f"local_{run.measure}", f"global_{run.measure}")
            values: Sequence[Any] = (None,) * len(keys)
            if last_round is not None:
                number = run.rounds[last_round].round
                values = (number, amounts[last_round], local_values[last_round], global_values[last_round])
            row = {"cost": cost, "amount": equal_cost, "run": run.title}
            figures.append(row | dict(zip(keys, values, strict=True)))
    return figures


def equal_cost_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """The same as a table; the first row is the header."""
    kind, score = runs[0].measure, partial(score_text, metric=runs[0].metric)
    titles = {"amount": "at most", "run": "run", "round": "round", "spent": "spent"}
    columns = [ResultColumn(key, title, str) for key, title in titles.items()]
    columns += [ResultColumn(f"{side}_{kind}", f"{side} {kind}", score) for side in ("local", "global")]
    figures_of_runs = equal_cost_figures(runs)
    for figures in figures_of_runs:
        for key in ("amount", "spent"):
            figures[key] = None if figures[key] is None else _cost_text(figures[key], figures["cost"])
        figures["round"] = figures["round"] or "none"
    return tables.column_rows(columns, figures_of_runs)


def _cost_text(value: float, cost: str) -> str:
    match cost:
        case "rounds":
            return quantity(int(value), "round")
        case "training_macs":
            return f"{tables.tera_macs_text(value)} TMACs"
        case _:
            return amount(value, "bytes" if cost == "bytes" else "s")


def target_rows(runs: Sequence[Record], target: float) -> list[tuple[str, ...]]:
    """Cost until each run's global model reached a target; the first row is the header.

    Speed-up is the first run's simulated time over each run's.
    """
    figures_of_runs: list[dict[str, Any]] = [target_figures(run, target) | {"run": run.title} for run in runs]
    baseline = figures_of_runs[0]["seconds"]
    for figures in figures_of_runs:
        seconds = figures["seconds"]
        figures["speed_up"] = baseline / seconds if baseline is not None and seconds else None
        figures["round"] = figures["round"] or "never"
    columns = [
        *(ResultColumn(key, key, str) for key in ("run", "round")),
        ResultColumn("seconds", "seconds", "{:,.0f}".format),
        ResultColumn("speed_up", "speed-up", "{:.2f}".format),
        ResultColumn("bytes", "MB down and up", tables.megabytes_text),
        ResultColumn("training_macs", "training TMACs", tables.tera_macs_text),
    ]
    return tables.column_rows(columns, figures_of_runs)


def print_comparison(
    runs: Sequence[Record], targets: Sequence[float] = (), variants: Mapping[str, Sequence[Record]] | None = None
) -> None:
    """Print the tables: fitted to a terminal, as Markdown elsewhere."""
    tables.print_results(runs)
    for title, rows in list(_comparison_tables(runs, targets, variants).items())[1:]:
        print(f"\n{title}")
        tables.print_rows(rows)


def _comparison_tables(
    runs: Sequence[Record], targets: Sequence[float], variants: Mapping[str, Sequence[Record]] | None
) -> dict[str, list[tuple[str, ...]]]:
    score, marked_runs = partial(score_text, metric=runs[0].metric), with_coverage_marks(runs)
    target_tables = {
        f"Until the global model's {runs[0].measure} was {score(t)}": target_rows(marked_runs, t) for t in targets
    }
    variants = variants or group_by_seed(runs)
    variant_table = {} if not variants else {variant_note(variants): variant_rows(variants)}
    equal_cost_table = {EQUAL_COST: equal_cost_rows(marked_runs)} if len(runs) > 1 else {}
    return {"Results": tables.final_rows(runs), **variant_table, **equal_cost_table, **target_tables}


def write_comparison(
    folder: Path,
    runs: Sequence[Record],
    targets: Sequence[float] = (),
    variants: Mapping[str, Sequence[Record]] | None = None,
) -> Path:
    """Write `comparison.html`, a self-contained page; the first run is the baseline. Returns it."""
    return tables.write_page(comparison_document(runs, targets, variants), folder / PAGE_FILE)


def comparison_document(
    runs: Sequence[Record], targets: Sequence[float] = (), variants: Mapping[str, Sequence[Record]] | None = None
) -> Document:
    """Several runs beside each other; arguments as for `write_comparison`."""
    kind = runs[0].measure
    intro = (
        f"{quantity(len(runs), 'run')}. {tables.tail_note(runs)} Local {kind} is that of the model "
        "that a device serves, on its own test data, as measured last, every device counting alike. Seconds are "
        "simulated time."
    )
    sections: dict[str, Sequence[Block]] = {
        "": [intro],
        **{title: [tables.result_table(rows)] for title, rows in _comparison_tables(runs, targets, variants).items()},
        "Local scores by device, and gains over training alone": [
            tables.result_table(_board_rows(runs)) if any(board_gains(run, runs) for run in runs) else ""
        ],
        "Learning": [Drawing(charts.learning_curves(with_coverage_marks(runs)))],
        "Data of the devices": [Drawing(runs[0].partition.heat_map())],
        **{f"Channels over the rounds: {run.title}": [Drawing(charts.coverage_map(run))] for run in runs},
    }
    # The page's header: each fact with the values of all runs.
    facts_of_runs = [run.facts() for run in runs]
    values = {key: list(dict.fromkeys(f[key] for f in facts_of_runs if f[key])) for key in facts_of_runs[0]}
    facts = {k: ", ".join(v) if len(v) <= _MAX_VALUES else f"{len(v)} different" for k, v in values.items()}
    return Document("Runs compared" if len(runs) > 1 else runs[0].title, facts, sections)
