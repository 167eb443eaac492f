"""The report of a run, and of several runs next to each other: a self-contained page, and its tables as Markdown."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedprune.core.errors import StorageError
from fedprune.core.text import amount, quantity, some
from fedprune.jobs.job import Job
from fedprune.output.document import Block, Document, Drawing, Table
from fedprune.output.tables import Column
from fedprune_server.devices import plan_vs_actual
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.executor.divergence import advice
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.record import DeviceRow, Record, also_measured, measured_names, shown
from fedprune_server.simulation.results.run_folder import RECORD

TAIL = 5
"""Rounds in a final mean: single rounds of a small test set are noisy."""

POINTS = 2.0
"""Points by which the fleet's accuracies may fall below the reference's."""

EXCESS = 0.05
"""Relative excess of the fleet's losses over the reference's, for regression."""

ROWS = 1000
"""Devices in a table."""

_NAMED = 10
"""Devices without updates, and warnings, that are listed, at most."""

SHARE = 0.15
"""Share of the reference's bytes that the fleet may use, each way."""


@dataclass(frozen=True)
class Claim:
    """A statement about two runs and its verdict."""

    text: str
    measured: str
    held: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.held else 'FAIL'}: {self.text} ({self.measured})"


@dataclass(frozen=True)
class Report:
    html: Path
    markdown: Path


def claims(run: Record, reference: Record) -> tuple[Claim, ...]:
    """Claims about narrow models, relative to a reference that trains the whole model on every device."""
    mine, theirs = run.final(TAIL), reference.final(TAIL)
    lost = [_worse(run, a, b) for a, b in zip(mine, theirs, strict=True)]
    metric = run.metric
    limit = POINTS / 100 if metric.share else EXCESS
    side = "below" if metric.higher else "above"
    allowed = f"{POINTS:.0f} points {side}" if metric.share else f"{EXCESS:.0%} {side}"
    shares = [_ratio(run.last.down, reference.last.down), _ratio(run.last.up, reference.last.up)]
    return (
        Claim(
            f"mean local and global {run.measure} at most {allowed} {reference.title}",
            f"local {_difference(run, lost[0])}, global {_difference(run, lost[1])}",
            all(d <= limit for d in lost),  # NaN compares false: a claim about something unmeasured fails
        ),
        Claim(
            f"at most {SHARE:.0%} of its bytes, down and up",
            f"down {_percent(shares[0])}, up {_percent(shares[1])}",
            all(s <= SHARE for s in shares),
        ),
    )


def summary(run: Record, reference: Record | None = None) -> list[tuple[str, ...]]:
    """Rows of the summary table; the first is the header."""
    runs = [run] + ([reference] if reference is not None else [])
    finals = [r.final(TAIL) for r in runs]
    last = [r.final() for r in runs]
    tail = min(TAIL, max(len(r.rounds) for r in runs))
    private = [("privacy", *map(_privacy, runs))] if any(r.private for r in runs) else []
    limited = [("updates limited", *map(_limited, runs))] if any(row.limited for r in runs for row in r.rounds) else []
    rows = [
        ("", *(r.title for r in runs)),
        (
            f"mean local {run.measure}{_over(tail)}",
            *(shown(f[0], r.metric) + _part(r) for r, f in zip(runs, finals, strict=True)),
        ),
        (f"global {run.measure}{_over(tail)}", *(shown(f[1], r.metric) for r, f in zip(runs, finals, strict=True))),
        *(
            (f"{kind} {run.measure}, last round", *(shown(f[i], r.metric) for r, f in zip(runs, last, strict=True)))
            for i, kind in enumerate(("mean local", "global"))
            if tail > 1
        ),
        ("MB down", *(f"{r.last.down / 1e6:,.2f}" for r in runs)),
        ("MB up", *(f"{r.last.up / 1e6:,.2f}" for r in runs)),
        ("rounds", *(str(len(r.rounds)) for r in runs)),
        ("seconds", *(f"{r.last.at:,.0f}" for r in runs)),
        *private,
        *limited,
    ]
    if reference is None:
        return rows
    notes = (
        "difference",
        *(_difference(run, _worse(run, a, b)) for a, b in zip(*finals, strict=True)),
        *(_difference(run, _worse(run, a, b)) for a, b in zip(*last, strict=True) if tail > 1),
        _change(_ratio(run.last.down, reference.last.down)),
        _change(_ratio(run.last.up, reference.last.up)),
        "",
        "",
        *("" for _ in (*private, *limited)),
    )
    return [(*row, note) for row, note in zip(rows, notes, strict=True)]


def _privacy(run: Record) -> str:
    """The privacy cost: the highest ε of any board."""
    settings = run.job.get("privacy")
    if not settings:
        return "none"
    cost = run.epsilon
    return "no noise" if cost is None else f"ε {cost:.3g} at δ {settings['delta']:g}, {settings['noise']} noise"


def _limited(run: Record) -> str:
    """Number of updates that counted for less than they were, by the settings that limit them."""
    names = ("move_limit", "weight_limit", "most_samples")
    values = {name: run.job.get(name, getattr(Job, name)) for name in names}
    said = ", ".join(f"{name} {value:g}" for name, value in values.items() if value)
    counts = f"{sum(row.limited for row in run.rounds):,} of {sum(row.updates for row in run.rounds):,}"
    return f"{counts} ({said})" if said else counts


_PLAN = ("device", "profile", "trains on", "samples", "density", "bound by", "widths", "parameters", "energy a round")


def plan_rows(run: Record) -> list[tuple[str, ...]]:
    """Rows of the plan table; the first is the header."""
    latest = run.latest
    gpus = any(d.unit == "GPU" for d in run.devices)
    return _filled(
        [
            (*_PLAN, f"local {run.measure}", "why not"),
            *(
                (
                    d.name,
                    d.profile,
                    d.unit if gpus else "",
                    str(d.samples),
                    f"{d.density:.3f}" if d.widths else "–",
                    d.bound or "the job",
                    " · ".join(map(str, d.widths)),
                    f"{d.parameters:,}",
                    "–" if d.train_j is None else amount(d.train_j, "J"),
                    shown(latest.get(d.name), run.metric),
                    _absence(run, d),
                )
                for d in run.devices
            ),
        ]
    )


def _warnings(run: Record) -> tuple[str, ...]:
    """Warnings of plans, each once with the devices that have it."""
    devices: dict[str, list[str]] = {}
    for d in run.devices:
        if d.warning:
            devices.setdefault(d.warning, []).append(d.name)
    return tuple(f"{some(names)}: {text}" for text, names in devices.items())[:_NAMED]


def absences(run: Record) -> list[str]:
    """A sentence for each device that no longer takes part, or never delivered an update that counts."""
    latest = set().union(*(r.density.keys() | r.local.keys() for r in run.rounds))
    lost = [d for d in run.devices if d.excluded or (d.missed and d.name not in latest)]
    said = [f"{d.name}: {_absence(run, d)}" for d in lost[:_NAMED]]
    return said if len(lost) <= _NAMED else [*said, f"and {len(lost) - _NAMED:,} more devices"]


def diverged(run: Record) -> str:
    """Whether training diverged, with advice; empty if it didn't."""
    measured = [r.metrics.get("loss") for r in run.rounds if r.metrics]
    mixed = run.uncalibrated and any(share < 1 for r in run.rounds for share in r.density.values())
    return advice(measured, [d.kind for d in run.devices], run.job, mixed=mixed)


def _absence(run: Record, device: DeviceRow) -> str:
    """Why a device took no part, in some rounds or all; empty if it always did."""
    if device.excluded:
        return device.excluded
    text = f"no update in {device.missed} of {quantity(len(run.rounds), 'round')}" if device.missed else ""
    return f"{text}, lastly: {device.why}" if device.why else text


def foresight_rows(run: Record) -> list[tuple[str, ...]]:
    """Rows of the table of predictions and measurements; the first is the header."""
    return _filled(plan_vs_actual.table([(d.name, d.compared) for d in run.devices if d.widths]))


def _filled(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A table without its empty columns."""
    kept = [i for i in range(len(rows[0])) if not i or any(row[i] not in ("", "–") for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def summary_text(run: Record, reference: Record | None = None, *, judged: bool = True) -> str:
    """Summary for a terminal, with the verdicts if the run is judged."""
    rows = summary(run, reference)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "   ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    if lost := absences(run):
        lines += ["", *lost]
    if spoilt := diverged(run):
        lines += ["", spoilt]
    if reference is not None and judged:
        lines += ["", *map(str, claims(run, reference))]
    return "\n".join(lines)


def run_document(run: Record, reference: Record | None = None, *, judged: bool = True) -> Document:
    """A run's report.

    Args:
        judged: Whether the comparison tests the claims.

    Raises:
        StorageError: The run has no finished round.
    """
    runs = [run] + ([reference] if reference is not None else [])
    intro = (
        f"{quantity(len(run.devices), 'device')}, {quantity(run.last.round, 'round')}. "
        f"Figures of {run.metric.title} in the summary are means over the last "
        f"{quantity(min(TAIL, len(run.rounds)), 'round')}. Local {run.measure} is that of the model that a device "
        f"serves, on its own test data, as measured last; its mean is over the {len(run.latest)} of "
        f"{len(run.devices)} devices that delivered." + (f" Bytes: {run.measured}." if run.measured else "")
    )
    verdicts = tuple(map(str, claims(run, reference))) if reference is not None and judged else ()
    sections: dict[str, Sequence[Block]] = {
        "": [intro],
        "Summary": [table(summary(run, reference)), verdicts],
        "Learning": [Drawing(charts.curves(runs))],
        "Devices": [Drawing(charts.devices(run, reference))],
        "Data of the devices": [Drawing(run.partition.heat_map())],
        "Bytes between server and devices": [Drawing(charts.traffic(runs))],
        "Channels of the devices": [Drawing(charts.channel_map(run))],
        "Channels over the rounds": [Drawing(charts.coverage_map(run))],
        "Plans": [table(plan_rows(run)), _warnings(run)],
        "Predicted and measured": [table(foresight_rows(run))],
    }
    return Document(run.title, run.facts(), sections)


def write_report(folder: Path, run: Record, reference: Record | None = None, *, judged: bool = True) -> Report:
    """Write `report.html` and `report.md`; arguments and errors as `run_document`."""
    document = run_document(run, reference, judged=judged)
    report = Report(folder / "report.html", folder / "report.md")
    _write(document, report.html, report.markdown)
    return report


def _write(document: Document, page: Path, markdown: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document.to_html(), encoding="utf-8")
    markdown.write_text(f"{document.to_markdown()}\nCharts are in [{page.name}]({page.name}).\n", encoding="utf-8")


_WORDS = ("", "run", "variant", "device", "profile", "trains on", "bound by", "why not")
"""Columns of text; the others hold numbers."""

_DROP_ORDER = {"training TMACs": 3, "rounds": 4}


def table(rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows as a table, of which only the first `ROWS` are shown; the first row is the header."""
    head, body = rows[0], rows[1:]
    if len(body) > ROWS:
        body = [*body[:ROWS], (f"and {len(body) - ROWS:,} more", *[""] * (len(head) - 1))]
    return Table([_column(title) for title in head], body)


def _column(title: str) -> Column:
    """A column; on a narrow terminal the run and its result stay."""
    if title in _WORDS:
        return Column(title, wrap=16 if title == "run" else 0)
    stays = title in ("round", "seconds", "speed-up") or title.startswith(("local ", "global "))
    return Column(title, right=True, drop=0 if stays else _DROP_ORDER.get(title, 1), wrap=8 if stays else 0)


def _part(run: Record) -> str:
    """Number of devices in a mean, if not all."""
    measured, all_ = len(run.latest), len(run.devices)
    return f" ({measured} of {quantity(all_, 'device')})" if measured < all_ else ""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _over(rounds: int) -> str:
    return f", last {rounds} rounds" if rounds > 1 else ""


def _change(ratio: float) -> str:
    """Relative change of an amount."""
    return f"{round(100 * (ratio - 1)):+d}%" if math.isfinite(ratio) else "–"


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _worse(run: Record, mine: float, theirs: float) -> float:
    """How much worse a measure is: a difference of shares, a relative difference of other numbers."""
    lost = theirs - mine if run.metric.higher else mine - theirs
    if run.metric.share:
        return lost
    return lost / abs(theirs) if theirs else math.nan


def _difference(run: Record, worse: float) -> str:
    if not math.isfinite(worse):
        return "not measured"
    change = -worse if run.metric.higher else worse
    return f"{round(100 * change, 1) + 0:+.1f} points" if run.metric.share else f"{change:+.1%}"


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


def final_figures(run: Record) -> dict[str, str | float | None]:
    """A run's results: bytes, MACs, simulated seconds and privacy cost in all, and measures as means over the last
    rounds; None where there is no measurement."""
    kind = run.measure
    local, whole = run.final(TAIL)
    return {
        "run": run.title,
        "rounds": len(run.rounds),
        "seconds": run.last.at,
        "bytes_down": run.last.down,
        "bytes_up": run.last.up,
        "training_macs": run.macs() or None,
        f"local_{kind}": _finite(local),
        f"global_{kind}": _finite(whole),
        **{f"{kind}_{m}": _tail(run.own_means(f"{kind}_{m}")) for m in also_measured([run])},
        **{name: _tail(run.measured_values(name)) for name in measured_names([run])},
        **({EPSILON: run.epsilon, "delta": run.job["privacy"]["delta"]} if run.private else {}),
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def final_rows(runs: Sequence[Record]) -> list[tuple[str, ...]]:
    """Final results: measures as means over the last rounds, amounts and privacy costs in all; the first row is the
    header."""
    kind, metric = runs[0].measure, runs[0].metric
    private = (EPSILON, "delta") if any(run.private for run in runs) else ()
    own = [f"{kind}_{m}" for m in also_measured(runs)]
    names = measured_names(runs)
    head = ("run", "rounds", "seconds", "MB down", "MB up", "training TMACs", f"local {kind}", f"global {kind}")
    rows = [(*head, *(f"local {m.partition('_')[2]}" for m in own), *names, *private)]
    for run in runs:
        found: dict[str, Any] = final_figures(run)
        measures = (found.get(key) for key in (f"local_{kind}", f"global_{kind}", *own, *names))
        rows.append(
            (
                run.title,
                str(found["rounds"]),
                f"{found['seconds']:,.0f}",
                *(f"{found[key] / 1e6:,.2f}" for key in ("bytes_down", "bytes_up")),
                _tmacs(found["training_macs"]),
                *(shown(value, metric) for value in measures),
                *("–" if (cost := found.get(key)) is None else f"{cost:.3g}" for key in private),
            )
        )
    return rows


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
    return {"Results": final_rows(runs), **several, **reached}


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
        f"{quantity(len(runs), 'run')}. Figures of {runs[0].metric.title} in the table are means over "
        f"the last {quantity(min(TAIL, max(len(r.rounds) for r in runs)), 'round')}. Local {kind} is that of the model "
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
    _write(Document("Runs compared", _shared(runs), sections), folder / PAGE, folder / "comparison.md")
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
