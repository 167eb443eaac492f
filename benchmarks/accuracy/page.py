"""A table as Markdown, made of the runs that there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.accuracy.protocol import Method, Protocol

Run = dict[str, Any]
Value = Callable[[Run], "float | None"]


def page(protocol: Protocol, runs: Sequence[Run], header: dict[str, Any]) -> str:
    """The page.

    Args:
        protocol: The table's settings.
        runs: Finished runs, of any methods and seeds.
        header: Date, machine, versions.
    """
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    minutes = sum(r["cpu_s"] for r in runs) / 60
    seeds = sorted({r["seed"] for r in runs})
    command = f"python -m benchmarks.accuracy {protocol.name} {protocol.changes}".strip()
    lines = [
        f"# {protocol.title}",
        "",
        f"{header['date']}, {header['machine']};",
        f"{versions}; trained by {', '.join(sorted({r['trainer'] for r in runs})) or 'nobody'}.",
        f"`{command}`: {len(runs)} runs, {minutes:.0f} CPU minutes; code:",
        f"{', '.join(sorted({r['code'] for r in runs})) or '-'}.",
        "",
        *_wrapped(_changed(protocol) + protocol.keeps + _net(protocol, runs)),
        "",
        *_reading(protocol, seeds),
        "",
        *_table(protocol, runs, _at_equal_rounds(protocol)),
    ]
    costly = [m.name for m in protocol.methods if _costlier(protocol, m, runs)]
    if costly:
        lines += ["", "## At equal bytes", "", *_wrapped(_EQUAL_BYTES.format(reference=protocol.reference)), ""]
        lines += _table(protocol, runs, _at_equal_bytes(protocol, runs), only=[protocol.reference, *costly])
    lines += _tiers(protocol, runs)
    papers = [(m.name, m.paper) for m in protocol.methods if m.paper]
    if papers or protocol.paper:
        lines += ["", "## The papers' figures", ""]
        lines += [f"- {name}: {figure}" for name, figure in papers]
        lines += ["", *_wrapped(protocol.paper)] if protocol.paper else []
    notes = [(m.name, m.note) for m in protocol.methods if m.note]
    if notes:
        lines += ["", "## Rows", "", *(f"- {name}: {note}" for name, note in notes)]
    missing = _missing(protocol, runs)
    if missing:
        lines += ["", f"Not run yet (seeds): {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _missing(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """Rows that lack runs, each with the seeds that it lacks."""
    lacking = {m.name: [s for s in protocol.seeds if not _of(runs, m.name, s)] for m in protocol.methods}
    return [f"{name} ({', '.join(map(str, seeds))})" for name, seeds in lacking.items() if seeds]


def _changed(protocol: Protocol) -> str:
    return f"A first look, with {protocol.changes} instead of what is said here. " if protocol.changes else ""


def in_short(protocol: Protocol, runs: Sequence[Run], date: str) -> list[str]:
    """A few columns of the table, for a page that has many of them."""
    kept = ("serves", "average", "before", "global", "MB a device", "TMAC", "active")
    columns = _at_equal_rounds(protocol)
    shown = [
        c for place, c in enumerate(columns)
        if c[0] in kept or c[0].startswith("s to") or (c[2] < 0 and columns[place - 1][0] in kept)
    ]  # fmt: skip
    seeds = sorted({r["seed"] for r in runs})
    link = f"[{protocol.title}](../benchmarks/results/accuracy/{protocol.name}.md)"
    said = (
        f"{link}, {date}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; Δ to {protocol.reference}:"
    )
    missing = _missing(protocol, runs)
    open_ = ["", f"Not run yet (seeds): {', '.join(missing)}."] if missing else []
    return ["", said, "", *_table(protocol, runs, shown), *open_, ""]


_EQUAL_BYTES = (
    "Methods that send more than {reference} in as many rounds, at the round in which they have sent what it sends "
    "in all; the same shares of those rounds are averaged."
)


def active_tmacs(row: dict[str, Any]) -> float | None:
    """TMACs of the weights that element masks left active until a round; None where that is all of them, or unknown."""
    found = row.get("active_macs", row["macs"])
    return None if found == row["macs"] else found / 1e12


def figure(protocol: Protocol, run: Run, read: Callable[[dict[str, Any]], float | None], last: int = 0) -> float | None:
    """A run's figure: the mean over what the protocol reads, of the first `last` rounds (0: all).

    Shares are of the run's rounds; of simulated time where that ends the runs, so that the same times are read of all.
    """
    rounds = run["rounds"][: last or None]
    timed = bool(protocol.until_s)
    end = rounds[-1]["at"] if timed else rounds[-1]["round"]
    if timed and not last:
        end = max(end, protocol.until_s)  # a run that ended by itself stays what it was
    found = []
    for share in protocol.reads:
        # The last round at or before that share in which it was measured.
        upto = [r for r in rounds if (r["at"] <= share * end if timed else r["round"] <= round(share * end))]
        upto = upto or rounds[:1]
        value = next((v for v in map(read, reversed(upto)) if v is not None), None)
        if value is None:
            return None
        found.append(value)
    return statistics.fmean(found)


def own(metric: str) -> Callable[[dict[str, Any]], float | None]:
    """Reads the mean over devices of what they measured, in percent."""

    def read(row: dict[str, Any]) -> float | None:
        value = row["own"].get(metric, {}).get("mean")
        return None if value is None else 100 * value

    return read


def measured(name: str) -> Callable[[dict[str, Any]], float | None]:
    """Reads what was measured of the global model, in percent."""

    def read(row: dict[str, Any]) -> float | None:
        value = row["measured"].get(name)
        return None if value is None else 100 * value

    return read


def target_time(protocol: Protocol, run: Run) -> float | None:
    """Simulated seconds until the global model reached the target; infinity if it never did."""
    if not protocol.target:
        return None
    return next((r["at"] for r in run["rounds"] if r["measured"].get("global", 0) >= protocol.target), math.inf)


def bytes_of(run: Run) -> float:
    """Bytes down and up, of all devices and rounds."""
    last = run["rounds"][-1]
    return float(last["down"] + last["up"])


Columns = list[tuple[str, Value, int]]
"""Heading, what it shows of a run, and decimals; -1 shows the difference to the reference instead, seed by seed."""


def _at_equal_rounds(protocol: Protocol) -> Columns:
    return _columns(protocol, lambda run: 0)


def _at_equal_bytes(protocol: Protocol, runs: Sequence[Run]) -> Columns:
    def last(run: Run) -> int:
        same = _of(runs, protocol.reference, run["seed"])
        budget = bytes_of(same[0]) if same else math.inf
        count = sum(r["down"] + r["up"] <= budget * 1.005 for r in run["rounds"])
        return max(1, count)

    return _columns(protocol, last)


def _columns(protocol: Protocol, last: Callable[[Run], int]) -> Columns:
    def mean(read: Callable[[dict[str, Any]], float | None]) -> Value:
        return lambda run: figure(protocol, run, read, last(run))

    def best(read: Callable[[dict[str, Any]], float | None]) -> Value:
        def value(run: Run) -> float | None:
            found = [v for v in map(read, run["rounds"][: last(run) or None]) if v is not None]
            return max(found) if found else None

        return value

    def cut(run: Run) -> dict[str, Any]:
        return run["rounds"][: last(run) or None][-1]

    def share(run: Run) -> float:
        return (cut(run)["down"] + cut(run)["up"]) / max(1, len(run["devices"])) / 1e6

    def serves(run: Run) -> float | None:
        return mean(own(f"accuracy_{protocol.method(run['method']).serves}"))(run)

    columns: Columns = [
        ("serves", serves, 1),
        ("Δ", serves, -1),
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
        ("MB a device", share, 2),
        ("TMAC", lambda run: cut(run)["macs"] / 1e12, 2),
        ("active", lambda run: active_tmacs(cut(run)), 2),
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
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(protocol: Protocol, runs: Sequence[Run], rows: Sequence[Run], value: Value, decimals: int) -> str:
    if decimals < 0:
        pairs = [(value(r), _of(runs, protocol.reference, r["seed"])) for r in sorted(rows, key=lambda r: r["seed"])]
        gaps = [v - w for v, same in pairs if v is not None and same and (w := value(same[0])) is not None]
        return " ".join(f"{g:+.1f}" for g in gaps).replace("-", "−") or "–"
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
            lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return lines if len(lines) > 5 else []


def _tier(method: Method, place: int) -> Callable[[dict[str, Any]], float | None]:
    """Reads the mean of what the devices of one tier serve, the widest being the first."""

    def read(row: dict[str, Any]) -> float | None:
        found = row["own"].get(f"accuracy_{method.serves}", {})
        tiers = sorted(found.get("tiers", {}).items(), key=lambda item: -float(item[0]))
        return float(tiers[place][1]) if place < len(tiers) else None

    return read


def _costlier(protocol: Protocol, method: Method, runs: Sequence[Run]) -> bool:
    pairs = [(r, _of(runs, protocol.reference, r["seed"])) for r in runs if r["method"] == method.name]
    return any(same and bytes_of(r) > 1.05 * bytes_of(same[0]) for r, same in pairs)


def _of(runs: Sequence[Run], method: str, seed: int) -> list[Run]:
    return [r for r in runs if r["method"] == method and r["seed"] == seed]


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
    else:
        reads = ", ".join(dict.fromkeys(str(max(1, round(s * protocol.rounds))) for s in protocol.reads))
        means = f"means of rounds {reads} (of the shares of all rounds, where a method has more)"
    pooled = protocol.data.get("pooled", True)
    tested = "all devices' test data together" if pooled else "the data set's own test data, which no device has"
    blends = any(m.serves == "average" for m in protocol.methods)
    blended = ", and by fedprune it is half such an average and half the received weights" if blends else ""
    text = (
        f"Accuracy in percent, {means} and of seeds {', '.join(map(str, seeds))}. "
        "*serves*: what devices predict with by that method, on their own test data, their mean: *after* local "
        "training, or *average*, each device's moving average of its trained weights (.85, no bytes). The published "
        f"methods serve the former; what the latter would give them is shown all the same{blended}; "
        "*before*: what the device was sent, on its own test data, as it was sent; *global*: the full global "
        f"model on {tested}; *sub*: what the strategy cuts out of it. Batch-norm statistics "
        "are measured again, alike for all: on a device's own training data for *after* and *average*, on 512 "
        "training samples of all for *global* and *sub*. Δ: difference to "
        f"{protocol.reference}, seed by seed. MB: both ways, all rounds, mean per device, graphs included. TMAC: "
        "MACs of all training; active: of weights that element masks leave, where there are some. "
    )
    if protocol.target:
        often = "every round" if protocol.every_global == 1 else f"every {protocol.every_global} rounds"
        if protocol.every_s:
            often = f"every {protocol.every_s:g} simulated seconds"
        text += f"s: simulated seconds at which *global*, measured {often}, was first found at the target. "
    return _wrapped(text.strip())


def _wrapped(text: str, width: int = 118) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines
