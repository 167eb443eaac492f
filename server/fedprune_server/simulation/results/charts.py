"""Charts of runs for reports: learning, devices, data, bytes, channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from fedprune.core.metrics import Metric
from fedprune.core.text import quantity
from fedprune.output.chart import Chart, lay_out_chart, merge_curves, series_classes, share_strip
from fedprune.output.chart_html import heat_scale
from fedprune.output.page import Bar, bars_html, charts_html, colour_legend, paragraph_html
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.results.record import Record, measured_moments, measured_names, score_text

T = TypeVar("T")

MAX_MAP_GROUPS = 12  # channel groups next to each other in a row
MAX_LISTED_DEVICES = 300  # devices that a list shows; of larger fleets these many, evenly spread
MAX_DEVICE_CURVES = 100  # devices up to which each has a curve
MAX_DEVICES_WITHOUT_HISTOGRAM = 24  # devices from which there is a histogram, too
MAX_MAP_ROUNDS = 40  # rows of the map of channels over rounds
MAX_MEASUREMENT_CURVES = 6  # measurements of a simulation that get curves

_EPSILON_METRIC = Metric(EPSILON, "ε", higher_is_better=False, is_share=False)

# A round's position on an x axis.
RoundPosition = Callable[[RoundRow], float]

# The x axes of curves: rounds, bytes sent so far both ways, virtual time.
X_AXES: tuple[tuple[str, RoundPosition], ...] = (
    ("round", lambda r: r.round),
    ("MB", lambda r: (r.down + r.up) / 1e6),
    ("seconds", lambda r: r.elapsed_s),
)

# A value per round, or None.
RoundValues = Callable[[Record], "Sequence[float | None]"]

# Title, metric and values.
Curve = tuple[str, Metric, RoundValues]


def learning_curves(runs: Sequence[Record]) -> str:
    """Curves of the global and local models' leading metric and of the privacy cost, by rounds, bytes and time.

    The runs are laid over each other; their titles tell them apart.
    """
    all_charts = [
        _curve(f"curve-{i}-{label}", f"{title}, by {label}", runs, values, metric, label, along)
        for i, (title, metric, values) in enumerate(curve_rows(runs))
        for label, along in X_AXES
    ]
    drawn_charts = [c for c in all_charts if c is not None]
    return charts_html(drawn_charts, "curves") if drawn_charts else ""


def device_score_charts(run: Record, reference: Record | None) -> str:
    """The leading metric of every device: by rounds, as a distribution, and as measured last."""
    rounds = [float(r.round) for r in run.rounds]
    local = [r.local for r in run.rounds]
    kind = run.measure
    blocks = []
    if 1 < len(run.devices) <= MAX_DEVICE_CURVES and len(rounds) > 1:
        series = {d.name: [values.get(d.name) for values in local] for d in run.devices}
        device_chart = _chart("devices", f"Local {kind} by round", rounds, series, run.metric)
        blocks.append(charts_html([device_chart], "device-curves") if device_chart is not None else "")
    runs = [run] + ([reference] if reference is not None else [])
    if len(run.devices) > MAX_DEVICES_WITHOUT_HISTOGRAM:
        blocks.append(_histogram(runs))
    names = [r.title for r in runs]
    axis_end = 1.0 if run.metric.is_share else max((v for r in runs for v in r.latest.values()), default=1.0) or 1.0
    rows = []
    for device in _evenly_spaced(run.devices, MAX_LISTED_DEVICES):
        for i, run_of_bar in enumerate(runs):
            value = run_of_bar.latest.get(device.name)
            name = f"{device.name} (density {device.density:.2f})" if not i else f"{device.name} ({names[i]})"
            share = 0.0 if value is None else min(1.0, max(0.0, value / axis_end))
            rows.append(Bar(name, ((f"part {series_classes(i)}", 0.0, share),), score_text(value, run.metric)))
    legend = colour_legend(names) if len(runs) > 1 else ""
    text = paragraph_html("The model that each device serves, on its own test data, as measured last; – for never.")
    return "".join(blocks) + text + legend + bars_html(rows, f"Local {kind} of each device")


def channel_map(run: Record) -> str:
    """Channels that each device held in the last round: a row per device, a strip per group, a tile per channel."""
    names = [d.name for d in run.devices if d.name in run.channels]
    groups = run.groups[:MAX_MAP_GROUPS]
    if not names or not groups:
        return ""
    rows = []
    for name in _evenly_spaced(names, MAX_LISTED_DEVICES):
        held_groups = [(*groups[g], frozenset(run.channels[name][g])) for g in range(len(groups))]
        strips = [share_strip(label, [float(c in held) for c in range(size)]) for label, size, held in held_groups]
        counts_text = ", ".join(f"{label}: {len(held)} of {size}" for label, size, held in held_groups)
        held_count, total_count = sum(len(held) for *_, held in held_groups), sum(size for _, size in groups)
        rows.append(Bar(name, strips, f"{held_count:,} of {total_count:,} channels", f"{name}: {counts_text}"))
    text = paragraph_html(f"Filled channels are held in the last round. {_group_names(run)}")
    return text + bars_html(rows, "Channels that each device holds")


def coverage_map(run: Record) -> str:
    """Share of each round's client updates that trained a channel: a row per round, a strip per group."""
    covered_rounds = [r for r in run.rounds if r.coverage]
    groups = [i for i, (_, size) in enumerate(run.groups) if size > 1][:MAX_MAP_GROUPS]
    if not covered_rounds or not groups:
        return ""
    rows = [
        Bar(
            f"round {row.round}",
            [share_strip(run.groups[g][0], [c / max(1, row.updates) for c in row.coverage[g]]) for g in groups],
            quantity(row.updates, "update"),
        )
        for row in _evenly_spaced(covered_rounds, MAX_MAP_ROUNDS)
    ]
    text = paragraph_html(f"Share of each round's client updates that trained a channel. {_group_names(run)}")
    return text + heat_scale() + bars_html(rows, "Coverage of every round")


def score_curves(runs: Sequence[Record]) -> list[Curve]:
    """The global and the mean local measure."""
    kind, metric = runs[0].measure, runs[0].metric
    rows = (f"Global {kind}", metric, Record.global_values), (f"Mean local {kind}", metric, Record.mean_locals)
    return _with_values(runs, rows)


def curve_rows(runs: Sequence[Record]) -> list[Curve]:
    """The same, and what else was measured."""
    kind, metric = runs[0].measure, runs[0].metric
    rows: list[Curve] = []
    for moment in measured_moments(runs):
        title = f"Local {kind} as {'received' if moment == 'before' else 'trained'}"
        rows.append((title, metric, partial(Record.own_means, metric=f"{kind}_{moment}")))
    suffix = "_loss" if kind == "loss" else ""
    # Further sets of samples last.
    names = sorted(measured_names(runs), key=lambda name: "/" in name)[:MAX_MEASUREMENT_CURVES]
    rows += [
        (f"Measured: {name.removesuffix(suffix)}", metric, partial(Record.measured_values, name=name)) for name in names
    ]
    rows.append(("Privacy cost: ε", _EPSILON_METRIC, partial(Record.measured_values, name=EPSILON)))
    return score_curves(runs) + _with_values(runs, rows)


def _with_values(runs: Sequence[Record], rows: Iterable[Curve]) -> list[Curve]:
    return [row for row in rows if any(v is not None for run in runs for v in row[2](run))]


def _curve(
    key: str, title: str, runs: Sequence[Record], values: RoundValues, metric: Metric, label: str, along: RoundPosition
) -> Chart | None:
    points = {
        run.title: [(along(r), v) for r, v in zip(run.rounds, values(run), strict=True) if v is not None]
        for run in runs
    }
    x_values, series = merge_curves(points)
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
    return lay_out_chart(
        key,
        title,
        x_values,
        series,
        partial(score_text, metric=metric),
        unit=(0.01, "%") if metric.is_share else (1.0, ""),
        x_title=along,
        top=100.0 if metric.is_share else None,
        bridges_gaps=True,
        is_amount_axis=amounts,
    )


def _histogram(runs: Sequence[Record]) -> str:
    """How many devices have which local measure."""
    kind, metric = runs[0].measure, runs[0].metric
    values = [v for run in runs for v in run.latest.values() if math.isfinite(v)]
    if not values:
        return ""
    # The least bit more, so that the largest value is in the last bin and equal values have a bin at all.
    low, high = (0.0, 1.0) if metric.is_share else (min(values), max(values) + 1e-12)
    bins = 10
    counts = [Counter(min(bins - 1, int(bins * (v - low) / (high - low))) for v in run.latest.values()) for run in runs]
    largest_count = max(max(counter.values(), default=0) for counter in counts) or 1
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    rows = [
        Bar(
            f"{score_text(edges[i], metric)} to {score_text(edges[i + 1], metric)}"
            + (f", {run.title}" if len(runs) > 1 else ""),
            ((f"part {('one', 'two')[j]}", 0.0, counts[j][i] / largest_count),),
            quantity(counts[j][i], "device"),
        )
        for i in range(bins)
        for j, run in enumerate(runs)
        if any(counter[i] for counter in counts)
    ]
    return paragraph_html(f"Devices by local {kind}.") + bars_html(rows, f"Devices by local {kind}")


def _group_names(run: Record) -> str:
    group_list = ", ".join(f"{label} ({size})" for label, size in run.groups[:MAX_MAP_GROUPS])
    return f"Groups from left to right: {group_list}."


def _evenly_spaced(entries: Iterable[T], max_entries: int) -> list[T]:
    """The entries, or `max_entries` of them, evenly spaced."""
    all_entries = list(entries)
    if len(all_entries) <= max_entries:
        return all_entries
    return [all_entries[i * (len(all_entries) - 1) // (max_entries - 1)] for i in range(max_entries)]
