"""The report of a run: a self-contained page, and its tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.metrics import TRAINED
from fedprune.core.text import amount, quantity, some
from fedprune.jobs.job import Job
from fedprune.output.document import Block, Document, Drawing, Table
from fedprune.output.tables import Column
from fedprune_server.devices import plan_vs_actual
from fedprune_server.executor.divergence import advice
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.record import DeviceRow, Record, shown

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
    best = [math.nan if r.best is None else r.best.metrics[r.measure] for r in runs]
    tail = min(TAIL, max(len(r.rounds) for r in runs))
    private = [("privacy", *map(_privacy, runs))] if any(r.private for r in runs) else []
    limited = [("updates limited", *map(_limited, runs))] if any(row.limited for r in runs for row in r.rounds) else []
    rows = [
        ("", *(r.title for r in runs)),
        (
            f"mean local {run.measure}{_over(tail)}",
            *(_local(r, f[0]) for r, f in zip(runs, finals, strict=True)),
        ),
        (f"global {run.measure}{_over(tail)}", *(shown(f[1], r.metric) for r, f in zip(runs, finals, strict=True))),
        *(
            (f"{kind} {run.measure}, last round", *(shown(f[i], r.metric) for r, f in zip(runs, last, strict=True)))
            for i, kind in enumerate(("mean local", "global"))
            if tail > 1
        ),
        *((f"best global {run.measure} (round)", *map(_best, runs)) for _ in range(tail > 1)),
        ("MB down", *(f"{r.last.down / 1e6:,.2f}" for r in runs)),
        ("MB up", *(f"{r.last.up / 1e6:,.2f}" for r in runs)),
        ("rounds", *map(rounds_done, runs)),
        ("seconds", *(f"{r.last.at:,.0f}" for r in runs)),
        *private,
        *limited,
    ]
    if reference is None:
        return rows
    notes = (
        "difference",
        *(_difference(run, _worse(run, a, b)) for a, b in zip(*finals, strict=True)),
        *(_difference(run, _worse(run, a, b)) for a, b in (*zip(*last, strict=True), best) if tail > 1),
        _change(_ratio(run.last.down, reference.last.down)),
        _change(_ratio(run.last.up, reference.last.up)),
        "",
        "",
        *("" for _ in (*private, *limited)),
    )
    return [(*row, note) for row, note in zip(rows, notes, strict=True)]


def _local(run: Record, value: float) -> str:
    """The mean local measure, of which private boards report nothing."""
    return "withheld" if run.private and not run.latest else shown(value, run.metric) + _part(run)


def _best(run: Record) -> str:
    """The best global model's score, and the round that it is of."""
    best = run.best
    return "–" if best is None else f"{shown(best.metrics[run.measure], run.metric)} ({best.round})"


def round_table(run: Record) -> list[tuple[str, ...]]:
    """Rows of the table of rounds: scores of each round's new global model on the server's samples, and of the models
    that devices received and trained on theirs, as means of each device's latest; the first row is the header."""
    kind = run.measure
    columns = {
        f"global {kind}": run.global_values(),
        f"local {kind} as received": run.own_means(f"{kind}_before"),
        f"local {kind} as trained": run.own_means(f"{kind}_{TRAINED}"),
    }
    values = zip(run.rounds, *columns.values(), strict=True)
    rows = [(str(row.round), *(shown(value, run.metric) for value in scores)) for row, *scores in values]
    return _filled([("round", *columns), *rows])


def rounds_done(run: Record) -> str:
    """Number of a run's rounds, and those of its job where it ended early."""
    done = str(len(run.rounds))
    return f"{done} of {run.job['rounds']}" if run.ended_early else done


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
    counts = limited_part(run)
    return f"{counts} ({said})" if said else counts


def limited_part(run: Record) -> str:
    """Number of updates that limits changed, of all; a dash where updates weren't counted."""
    limited, updates = run.count_limited
    return f"{limited:,} of {updates:,}" if updates else "–"


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


def remarks(run: Record) -> list[str]:
    """Caveats about a run's figures: an early end, devices without updates, a training that diverged."""
    return [line for line in (run.ended_early, *absences(run), diverged(run)) if line]


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
    if said := remarks(run):
        lines += ["", *said]
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
        + (f"The run {run.ended_early}. " if run.ended_early else "")
        + f"Figures of {run.metric.title} in the summary are means over the last "
        f"{quantity(min(TAIL, len(run.rounds)), 'round')}. {_local_note(run)}{_trained_note(run)}"
        + (f" Bytes: {run.measured}." if run.measured else "")
    )
    verdicts = tuple(map(str, claims(run, reference))) if reference is not None and judged else ()
    sections: dict[str, Sequence[Block]] = {
        "": [intro],
        "Summary": [table(summary(run, reference)), verdicts],
        "Learning": [
            Drawing(charts.curves(runs)),
            replace(table(round_table(run)), summary="Scores of each round"),
        ],
        "Devices": [Drawing(charts.devices(run, reference))],
        "Data of the devices": [Drawing(run.partition.heat_map())],
        "Bytes between server and devices": [Drawing(charts.traffic(runs))],
        "Channels of the devices": [Drawing(charts.channel_map(run))],
        "Channels over the rounds": [Drawing(charts.coverage_map(run))],
        "Plans": [table(plan_rows(run)), _warnings(run)],
        "Predicted and measured": [table(foresight_rows(run))],
    }
    return Document(run.title, run.facts(), sections)


def _local_note(run: Record) -> str:
    if run.private and not run.latest:
        return f"Local {run.measure} is withheld: devices of a private job report nothing that is measured on samples."
    return (
        f"Local {run.measure} is that of the model that a device serves, on its own test data, as measured last; its "
        f"mean is over the {len(run.latest)} of {len(run.devices)} devices that delivered."
    )


def _trained_note(run: Record) -> str:
    """Which shares of the channels boards trained in which rounds, where that changed: beside a core they train less
    than the plans say."""
    phases: list[tuple[int, str]] = []
    for row in run.rounds:
        if not row.density:
            continue
        low, high = min(row.density.values()), max(row.density.values())
        share = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        if not phases or phases[-1][1] != share:
            phases.append((row.round, share))
    if not 1 < len(phases) <= TAIL:
        return ""
    said = some([f"{share} from round {number} on" for number, share in phases], most=TAIL)
    return f" Boards trained these shares of the channels: {said}."


def write_report(folder: Path, run: Record, reference: Record | None = None, *, judged: bool = True) -> Report:
    """Write `report.html` and `report.md`; arguments and errors as `run_document`."""
    document = run_document(run, reference, judged=judged)
    report = Report(folder / "report.html", folder / "report.md")
    write_document(document, report.html, report.markdown)
    return report


def write_document(document: Document, page: Path, markdown: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document.to_html(), encoding="utf-8")
    markdown.write_text(f"{document.to_markdown()}\nCharts are in [{page.name}]({page.name}).\n", encoding="utf-8")


_WORDS = ("", "at most", "run", "variant", "device", "profile", "trains on", "bound by", "why not")
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
