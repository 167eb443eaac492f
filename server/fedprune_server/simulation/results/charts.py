"""Charts of runs for reports: learning, devices, data, bytes, channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from fedprune.core.metrics import Metric
from fedprune.core.text import amount, quantity
from fedprune.output.chart import Chart, chart, scale, style, tiles, together
from fedprune.output.page import Bar, bars, boxes, charts, paragraph
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.results.record import Record, also_measured, measured_names, shown

T = TypeVar("T")

# Channel groups next to each other in a row.
GROUPS = 12

# Devices that a list shows; of larger fleets these many, evenly spread.
DEVICES = 300

# Devices up to which each has a curve.
CURVES = 100

# Devices from which there is a histogram, too.
FEW = 24

# Rows of the map of channels over rounds.
ROUNDS = 40

# Measurements of a simulation that get curves.
MEASURED = 6

_COST = Metric(EPSILON, "ε", higher=False, share=False)

# The x axes of curves: rounds, bytes sent so far both ways, virtual time.
_ALONG: tuple[tuple[str, Callable[[RoundRow], float]], ...] = (
    ("round", lambda r: r.round),
    ("MB", lambda r: (r.down + r.up) / 1e6),
    ("seconds", lambda r: r.at),
)

# A value per round, or None.
Values = Callable[[Record], "Sequence[float | None]"]


def curves(runs: Sequence[Record]) -> str:
    """Curves of the global and local models' leading metric and of the privacy cost, by rounds, bytes and time.

    Args:
        runs: Runs laid over each other; their titles tell them apart.
    """
    all_charts = [
        _curve(f"curve-{i}-{label}", f"{title}, by {label}", runs, values, metric, label, along)
        for i, (title, metric, values) in enumerate(_rows(runs))
        for label, along in _ALONG
    ]
    drawn_charts = [c for c in all_charts if c is not None]
    return charts(drawn_charts, "curves") if drawn_charts else ""


def devices(run: Record, reference: Record | None) -> str:
    """The leading metric of every device: by rounds, as a distribution, and as measured last."""
    rounds = [float(r.round) for r in run.rounds]
    local = [r.local for r in run.rounds]
    kind = run.measure
    blocks = []
    if 1 < len(run.devices) <= CURVES and len(rounds) > 1:
        series = {d.name: [values.get(d.name) for values in local] for d in run.devices}
        device_chart = _chart("devices", f"Local {kind} by round", rounds, series, run.metric)
        blocks.append(charts([device_chart], "device-curves") if device_chart is not None else "")
    runs = [run] + ([reference] if reference is not None else [])
    if len(run.devices) > FEW:
        blocks.append(_histogram(runs))
    names = [r.title for r in runs]
    axis_end = 1.0 if run.metric.share else max((v for r in runs for v in r.latest.values()), default=1.0) or 1.0
    rows = []
    for device in _spread(run.devices, DEVICES):
        for i, run_of_bar in enumerate(runs):
            value = run_of_bar.latest.get(device.name)
            name = f"{device.name} (density {device.density:.2f})" if not i else f"{device.name} ({names[i]})"
            share = 0.0 if value is None else min(1.0, max(0.0, value / axis_end))
            rows.append(Bar(name, ((f"part {style(i)}", 0.0, share),), shown(value, run.metric)))
    legend = boxes(names) if len(runs) > 1 else ""
    text = paragraph("The model that each device serves, on its own test data, as measured last; – for never.")
    return "".join(blocks) + text + legend + bars(rows, f"Local {kind} of each device")


def traffic(runs: Sequence[Record]) -> str:
    largest_bytes = max(max(r.last.down, r.last.up) for r in runs) or 1
    rows = [
        Bar(f"{run.title}, {direction}", ((f"part {style(i)}", 0.0, count / largest_bytes),), amount(count, "bytes"))
        for i, run in enumerate(runs)
        for direction, count in (("down", run.last.down), ("up", run.last.up))
    ]
    return bars(rows, "Bytes down and up")


def channel_map(run: Record) -> str:
    """Channels that each device held in the last round: a row per device, a strip per group, a tile per channel."""
    names = [d.name for d in run.devices if d.name in run.channels]
    groups = run.groups[:GROUPS]
    if not names or not groups:
        return ""
    rows = []
    for name in _spread(names, DEVICES):
        held_channels = [frozenset(run.channels[name][g]) for g in range(len(groups))]
        strips = [
            tiles(label, [float(c in group_channels) for c in range(size)])
            for (label, size), group_channels in zip(groups, held_channels, strict=True)
        ]
        counts_text = ", ".join(
            f"{label}: {len(group_channels)} of {size}"
            for (label, size), group_channels in zip(groups, held_channels, strict=True)
        )
        total_channels = sum(size for _, size in groups)
        rows.append(
            Bar(
                name,
                strips,
                f"{sum(map(len, held_channels)):,} of {total_channels:,} channels",
                f"{name}: {counts_text}",
            )
        )
    return paragraph(f"Filled channels are held in the last round. {_group_names(run)}") + bars(
        rows, "Channels that each device holds"
    )


def coverage_map(run: Record) -> str:
    """Share of each round's client updates that trained a channel: a row per round, a strip per group."""
    covered_rounds = [r for r in run.rounds if r.coverage]
    groups = [i for i, (_, size) in enumerate(run.groups) if size > 1][:GROUPS]
    if not covered_rounds or not groups:
        return ""
    rows = [
        Bar(
            f"round {row.round}",
            [tiles(run.groups[g][0], [c / max(1, row.updates) for c in row.coverage[g]]) for g in groups],
            quantity(row.updates, "update"),
        )
        for row in _spread(covered_rounds, ROUNDS)
    ]
    return (
        paragraph(f"Share of each round's client updates that trained a channel. {_group_names(run)}")
        + scale()
        + bars(rows, "Coverage of every round")
    )


def _rows(runs: Sequence[Record]) -> list[tuple[str, Metric, Values]]:
    """The title, metric and values of each curve that has values."""
    kind, metric = runs[0].measure, runs[0].metric
    rows: list[tuple[str, Metric, Values]] = [
        (f"Global {kind}", metric, lambda record: record.global_values()),
        (f"Mean local {kind}", metric, lambda record: record.mean_locals()),
    ]
    for moment in also_measured(runs):
        title = f"Local {kind} as {'received' if moment == 'before' else 'trained'}"
        rows.append((title, metric, partial(Record.own_means, metric=f"{kind}_{moment}")))
    suffix = "_loss" if kind == "loss" else ""
    names = sorted(measured_names(runs), key=lambda name: "/" in name)[:MEASURED]  # further sets of samples last
    rows += [
        (f"Measured: {name.removesuffix(suffix)}", metric, partial(Record.measured_values, name=name)) for name in names
    ]
    rows.append(("Privacy cost: ε", _COST, partial(Record.measured_values, name=EPSILON)))
    return [row for row in rows if any(v is not None for run in runs for v in row[2](run))]


def _curve(
    key: str,
    title: str,
    runs: Sequence[Record],
    values: Values,
    metric: Metric,
    label: str,
    along: Callable[[RoundRow], float],
) -> Chart | None:
    points = {
        run.title: [(along(r), v) for r, v in zip(run.rounds, values(run), strict=True) if v is not None]
        for run in runs
    }
    x_values, series = together(points)
    if not x_values:
        return None
    return _chart(key, title, x_values, series, metric, along=label, amounts=label != "round")


def _chart(
    key: str,
    title: str,
    x_values: Sequence[float],
    series: dict[str, list[float | None]],
    metric: Metric,
    *,
    along: str = "round",
    amounts: bool = False,
) -> Chart | None:
    return chart(
        key,
        title,
        x_values,
        series,
        partial(shown, metric=metric),
        unit=(0.01, "%") if metric.share else (1.0, ""),
        along=along,
        top=100.0 if metric.share else None,
        bridged=True,
        amounts=amounts,
    )


def _histogram(runs: Sequence[Record]) -> str:
    """How many devices have which local measure."""
    kind, metric = runs[0].measure, runs[0].metric
    values = [v for run in runs for v in run.latest.values() if math.isfinite(v)]
    if not values:
        return ""
    # The least bit more, so that the largest value is in the last bin and equal values have a bin at all.
    low, high = (0.0, 1.0) if metric.share else (min(values), max(values) + 1e-12)
    bins = 10
    counts = [Counter(min(bins - 1, int(bins * (v - low) / (high - low))) for v in run.latest.values()) for run in runs]
    largest_count = max(max(counter.values(), default=0) for counter in counts) or 1
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    rows = [
        Bar(
            f"{shown(edges[i], metric)} to {shown(edges[i + 1], metric)}" + (f", {run.title}" if len(runs) > 1 else ""),
            ((f"part {('one', 'two')[j]}", 0.0, counts[j][i] / largest_count),),
            quantity(counts[j][i], "device"),
        )
        for i in range(bins)
        for j, run in enumerate(runs)
        if any(counter[i] for counter in counts)
    ]
    return paragraph(f"Devices by local {kind}.") + bars(rows, f"Devices by local {kind}")


def _group_names(run: Record) -> str:
    group_list = ", ".join(f"{label} ({size})" for label, size in run.groups[:GROUPS])
    return f"Groups from left to right: {group_list}."


def _spread(entries: Iterable[T], max_entries: int) -> list[T]:
    """The entries, or `max_entries` of them, evenly spaced."""
    all_entries = list(entries)
    return (
        all_entries
        if len(all_entries) <= max_entries
        else [all_entries[i * (len(all_entries) - 1) // (max_entries - 1)] for i in range(max_entries)]
    )
