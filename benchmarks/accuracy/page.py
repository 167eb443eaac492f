"""A table as Markdown, made of the runs that there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.accuracy.figures import (
    Run,
    Value,
    cost,
    current,
    figure,
    measured,
    of,
    own,
    paired,
    served,
    share,
    target_time,
    wrapped,
)
from benchmarks.accuracy.protocol import FULL, Method, Protocol
from benchmarks.accuracy.verdicts import verdict_lines


def page(protocol: Protocol, runs: Sequence[Run], header: dict[str, Any]) -> str:
    """The page.

    Args:
        protocol: The table's settings.
        runs: Finished runs, of any methods and seeds; those of other code or settings are marked `stale`.
        header: Date, machine, versions, and the commit whose code made all runs that aren't stale.
    """
    finished, runs = runs, current(protocol, runs)
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    minutes = sum(r["cpu_s"] for r in runs) / 60
    seeds = sorted({r["seed"] for r in runs})
    command = f"python -m benchmarks.accuracy {protocol.name} {protocol.changes}".strip()
    lines = [
        f"# {protocol.title}",
        "",
        f"{header['date']}, {header['machine']};",
        f"{versions}; trained by {', '.join(sorted({r['trainer'] for r in runs})) or 'nobody'}.",
        f"`{command}`: {len(runs)} runs, {minutes:.0f} CPU minutes; code: {header.get('code') or '-'}.",
        *_stale(protocol, finished),
        *_replayed(runs),
        "",
        *wrapped(_changed(protocol) + protocol.keeps + _net(protocol, runs)),
        "",
        *_reading(protocol, seeds),
        "",
        *_table(protocol, runs, _at_equal_rounds(protocol, runs)),
        *verdict_lines(protocol, runs),
    ]
    costly = [m.name for m in protocol.methods if _costlier(protocol, m, runs)]
    if costly:
        lines += ["", "## At equal bytes", "", *wrapped(_EQUAL_BYTES.format(reference=protocol.reference)), ""]
        lines += _table(protocol, runs, _at_equal_bytes(protocol, runs), only=[protocol.reference, *costly])
    lines += _tiers(protocol, runs)
    lines += _densities(protocol, runs)
    papers = [(m.name, m.paper) for m in protocol.methods if m.paper]
    if papers or protocol.paper:
        lines += ["", "## The papers' figures", ""]
        lines += [f"- {name}: {figure}" for name, figure in papers]
        lines += ["", *wrapped(protocol.paper)] if protocol.paper else []
    notes = [(m.name, m.note) for m in protocol.methods if m.note]
    if notes:
        lines += ["", "## Rows", "", *(f"- {name}: {note}" for name, note in notes)]
    missing = _missing(protocol, finished)
    if missing:
        lines += ["", f"Not run yet (seeds): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _missing(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """Rows that lack runs, each with the seeds that it lacks."""
    lacking = {m.name: [s for s in protocol.seeds if not of(runs, m.name, s)] for m in protocol.methods}
    return _listed(lacking)


def _listed(rows: dict[str, list[int]]) -> list[str]:
    return [f"{name} ({', '.join(map(str, seeds))})" for name, seeds in rows.items() if seeds]


def _stale(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """A paragraph about runs of other code or settings than the page's."""
    rows = {
        m.name: sorted(r["seed"] for r in runs if r["method"] == m.name and r.get("stale")) for m in protocol.methods
    }
    if not any(rows.values()):
        return []
    code = ", ".join(sorted({r["code"] for r in runs if r.get("stale") and r.get("code")})) or "unknown"
    text = f"**To be run again (seeds): {', '.join(_listed(rows))}.** Their code or settings have changed since they "
    text += f"ran (commits: {code}). Rows of such runs alone are marked †; no verdict counts them."
    return ["", *wrapped(text)]


def _replayed(runs: Sequence[Run]) -> list[str]:
    """A paragraph about runs of earlier code whose first rounds were run again."""
    again = [r for r in runs if "replayed" in r]
    if not again:
        return []
    rounds, code = min(r["replayed"]["rounds"] for r in again), ", ".join(sorted({r["code"] for r in again}))
    text = f"{len(again)} runs are of earlier code (commits: {code}). "
    return ["", *wrapped(f"{text}The code of this page repeats their first {rounds} rounds to the last digit.")]


def _changed(protocol: Protocol) -> str:
    return f"A first look, with {protocol.changes} instead of what is said here. " if protocol.changes else ""


def in_short(protocol: Protocol, runs: Sequence[Run], date: str) -> list[str]:
    """A few columns of the table, for a page that has many of them."""
    kept = ("serves", "average", "before", "global", "MB a device", "% bytes", "TMAC", "% MACs", "active")
    finished, runs = runs, current(protocol, runs)
    columns = _at_equal_rounds(protocol, runs)
    shown = [
        c for place, c in enumerate(columns)
        if c[0] in kept or c[0].startswith("s to") or (c[2] < 0 and columns[place - 1][0] in kept)
    ]  # fmt: skip
    seeds = sorted({r["seed"] for r in runs})
    link = f"[{protocol.title}](../benchmarks/results/accuracy/{protocol.name}.md)"
    said = (
        f"{link}, {date}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; Δ to {protocol.reference}:"
    )
    missing = _missing(protocol, finished)
    open_ = ["", f"Not run yet (seeds): {', '.join(missing)}."] if missing else []
    return ["", said, *_stale(protocol, finished), "", *_table(protocol, runs, shown), *open_, ""]


_EQUAL_BYTES = (
    "Methods that send more than {reference} in as many rounds, at the round in which they have sent what it sends "
    "in all; the same shares of those rounds are averaged."
)


def active_tmacs(row: dict[str, Any]) -> float | None:
    """TMACs of the weights that element masks left active until a round; None where that is all of them, or unknown."""
    found = row.get("active_macs", row["macs"])
    return None if found == row["macs"] else found / 1e12


Columns = list[tuple[str, Value, int]]
"""Heading, what it shows of a run, and decimals; -1 shows the difference to the reference instead."""


def _at_equal_rounds(protocol: Protocol, runs: Sequence[Run]) -> Columns:
    return _columns(protocol, runs, lambda run: 0)


def _at_equal_bytes(protocol: Protocol, runs: Sequence[Run]) -> Columns:
    def last(run: Run) -> int:
        same = of(runs, protocol.reference, run["seed"])
        budget = cost(same[0])[0] if same else math.inf
        count = sum(r["down"] + r["up"] <= budget * 1.005 for r in run["rounds"])
        return max(1, count)

    return _columns(protocol, runs, last)


def _columns(protocol: Protocol, runs: Sequence[Run], last: Callable[[Run], int]) -> Columns:
    def mean(read: Callable[[dict[str, Any]], float | None]) -> Value:
        return lambda run: figure(protocol, run, read, last(run))

    def best(read: Callable[[dict[str, Any]], float | None]) -> Value:
        def value(run: Run) -> float | None:
            found = [v for v in map(read, run["rounds"][: last(run) or None]) if v is not None]
            return max(found) if found else None

        return value

    def cut(run: Run) -> dict[str, Any]:
        return run["rounds"][: last(run) or None][-1]

    columns: Columns = [
        ("serves", lambda run: served(protocol, run, last(run)), 1),
        ("Δ", lambda run: served(protocol, run, last(run)), -1),
        ("after", mean(own("accuracy_after")), 1),
        ("average", mean(own("accuracy_average")), 1),
        ("Δ", mean(own("accuracy_average")), -1),
        ("before", mean(own("accuracy_before")), 1),
        ("global", mean(measured("global")), 1),
        ("Δ", mean(measured("global")), -1),
    ]
    if protocol.submodels:
        columns += [(f"sub {d:g}", mean(measured(f"sub@{d:g}")), 1) for d in protocol.densities if d < 1]
    columns += [
        ("best average", best(own("accuracy_average")), 1),
        ("best global", best(measured("global")), 1),
        ("MB a device", lambda run: cost(run, last(run))[0] / max(1, len(run["devices"])) / 1e6, 2),
        ("% bytes", lambda run: share(runs, run, 0, last(run)), 1),
        ("TMAC", lambda run: cost(run, last(run))[1] / 1e12, 2),
        ("active", lambda run: active_tmacs(run["rounds"][: last(run) or None][-1]), 2),
        ("% MACs", lambda run: share(runs, run, 1, last(run)), 1),
        ("rounds", lambda run: float(cut(run)["round"]), 0),
    ]
    if protocol.target:
        columns.append((f"s to {100 * protocol.target:g} %", lambda run: target_time(protocol, run), 0))
    return columns


def _table(protocol: Protocol, runs: Sequence[Run], columns: Columns, only: Iterable[str] | None = None) -> list[str]:
    names = [m.name for m in protocol.methods if only is None or m.name in set(only)]
    shown = [c for c in columns if any(c[1](r) is not None for r in runs)]
    lines = [f"| method | {' | '.join(c[0] for c in shown)} |", f"|---|{'---:|' * len(shown)}"]
    for name in names:
        rows = [r for r in runs if r["method"] == name]
        if rows:
            cells = [_cell(protocol, runs, rows, value, decimals) for _, value, decimals in shown]
            lines.append(f"| {name}{_mark(rows, runs)} | {' | '.join(cells)} |")
    return lines


def _mark(rows: Sequence[Run], runs: Sequence[Run]) -> str:
    """What a row's name is followed by: its seeds, where the page has more, and † for other code."""
    seeds, all_ = ({r["seed"] for r in found} for found in (rows, runs))
    some = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))})" if seeds < all_ else ""
    return some + (" †" if any(r.get("stale") for r in rows) else "")


def _cell(protocol: Protocol, runs: Sequence[Run], rows: Sequence[Run], value: Value, decimals: int) -> str:
    if decimals < 0:
        name = rows[0]["method"]
        return "–" if name == protocol.reference else str(paired(runs, name, protocol.reference, value) or "–")
    found = [v for v in map(value, rows) if v is not None]
    if not found:
        return "–"
    if any(map(math.isinf, found)):
        reached = [v for v in found if not math.isinf(v)]
        return f"{statistics.fmean(reached):,.0f} ({len(reached)} of {len(found)})" if reached else "never"
    return f"{statistics.fmean(found):,.{decimals}f}"


def _tiers(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """Local accuracy by the devices' density."""
    if len(protocol.densities) < 2:
        return []
    lines = ["", "## Local accuracy by density", ""]
    lines += [f"| method | {' | '.join(f'{d:g}' for d in protocol.densities)} |"]
    lines += [f"|---|{'---:|' * len(protocol.densities)}"]
    for method in protocol.methods:
        rows = [r for r in runs if r["method"] == method.name]
        found = [[figure(protocol, r, _tier(method, place)) for r in rows] for place in range(len(protocol.densities))]
        if rows and all(v is not None for values in found for v in values):
            cells = [f"{100 * statistics.fmean(v for v in values if v is not None):.1f}" for values in found]
            lines.append(f"| {method.name}{_mark(rows, runs)} | {' | '.join(cells)} |")
    return lines if len(lines) > 5 else []


def _densities(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """The devices' mean density in the course of the runs, of rows in which it changes."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    lines = ["", "## Mean density, by share of a run", ""]
    lines += [f"| method | {' | '.join(f'{s:g}' for s in shares)} |", f"|---|{'---:|' * len(shares)}"]
    for method in protocol.methods:
        rows = [r for r in runs if r["method"] == method.name and all("density" in row for row in r["rounds"])]
        found = [[r["rounds"][round(s * (len(r["rounds"]) - 1))]["density"] for s in shares] for r in rows]
        if any(len(set(values)) > 1 for values in found):
            cells = [f"{statistics.fmean(values):.2f}" for values in zip(*found, strict=True)]
            lines.append(f"| {method.name}{_mark(rows, runs)} | {' | '.join(cells)} |")
    return lines if len(lines) > 5 else []


def _tier(method: Method, place: int) -> Callable[[dict[str, Any]], float | None]:
    """Reads the mean of what the devices of one tier serve, the widest being the first."""

    def read(row: dict[str, Any]) -> float | None:
        found = row["own"].get(f"accuracy_{method.serves}", {})
        tiers = sorted(found.get("tiers", {}).items(), key=lambda item: -float(item[0]))
        return float(tiers[place][1]) if place < len(tiers) else None

    return read


def _costlier(protocol: Protocol, method: Method, runs: Sequence[Run]) -> bool:
    pairs = [(r, of(runs, protocol.reference, r["seed"])) for r in runs if r["method"] == method.name]
    return any(same and cost(r)[0] > 1.05 * cost(same[0])[0] for r, same in pairs)


def _net(protocol: Protocol, runs: Sequence[Run]) -> str:
    """How large the network of these runs is."""
    found = sorted({tuple(r["parameters"]) for r in runs if "parameters" in r})
    if not found:
        return ""
    sizes = " or ".join(f"{trained:,} parameters and {others:,} batch-norm statistics" for trained, others in found)
    return f" The net ({protocol.net}) has {sizes}."


def _reading(protocol: Protocol, seeds: Sequence[int]) -> list[str]:
    if protocol.until_s:
        reads = ", ".join(f"{s * protocol.until_s:,.0f}" for s in protocol.reads)
        means = f"means of what was measured last by {reads} simulated seconds"
        if protocol.ends_at_target:
            means = "means of what was measured last in a run"
    else:
        reads = ", ".join(dict.fromkeys(str(max(1, round(s * protocol.rounds))) for s in protocol.reads))
        means = f"means of rounds {reads} (of the shares of all rounds, where a method has more)"
    pooled = protocol.data.get("pooled", True)
    tested = "all devices' test data together" if pooled else "the data set's own test data, which no device has"
    blends = any(m.serves == "average" for m in protocol.methods)
    blended = ", and by fedprune it is what boards serve: half such an average and half the received weights, or "
    blended = blended + "(`validate_blend`) the average alone where validation samples prefer it" if blends else ""
    text = (
        f"Accuracy in percent, {means} and of seeds {', '.join(map(str, seeds))}. "
        "*serves*: what devices predict with by that method, on their own test data, their mean: *after* local "
        "training, or *average*, each device's moving average of its trained weights (.85, no bytes). The published "
        f"methods serve the former; what the latter would give them is shown all the same{blended}; "
        "*before*: what the device was sent, on its own test data, as it was sent; *global*: the full global "
        f"model on {tested}; *sub*: what the strategy cuts out of it. Batch-norm statistics "
        "are measured again, alike for all: on a device's own training data for *after* and *average*, on 512 "
        "training samples of all for *global* and *sub*. Δ: mean of "
        f"the seeds' differences to {protocol.reference} ± half of its 95 % interval (Student's t). MB: both ways, all "
        "rounds, mean per device, graphs included. TMAC: MACs of all training; active: of weights that "
        "element masks leave, where there are some. "
    )
    if any(m.name == FULL for m in protocol.methods):
        text += f"% bytes and % MACs: of those of {FULL}. "
    if protocol.job.get("compression_down"):
        text += "Updates and weights travel as int8 differences, unless it is otherwise in the notes on rows. "
    if protocol.target:
        often = "every round" if protocol.every_global == 1 else f"every {protocol.every_global} rounds"
        if protocol.every_s:
            often = f"every {protocol.every_s:g} simulated seconds"
        text += f"s: simulated seconds at which *global*, measured {often}, was first found at the target. "
    return wrapped(text.strip())
