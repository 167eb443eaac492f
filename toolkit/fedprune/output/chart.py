"""The layout of line charts and channel strips in numbers and words; `output.chart_html` draws them.

A channel strip is one row of a heat map: for each channel of a group, the share of the devices that hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

# Units of the plot, which the browser stretches to its room: the more, the finer are positions of one decimal.
WIDTH = 1000
HEIGHT = 100

# Points of a curve; longer ones are thinned evenly. A screen shows few more, and a page with many charts stays small.
MAX_CURVE_POINTS = 500

# Rows of the table of values, which has the latest ones.
MAX_TABLE_ROWS = 60

# Tiles of a strip: more would be narrower than a dot of the screen.
MAX_TILES = 140

# Curves up to which a chart has a table of values: a wider one is unreadable on any screen.
MAX_TABLE_CURVES = 12

# Steps of the heat map's scale above zero.
LEVELS = 10

# Larger values are left out, as NaN is: one diverged round would press all others onto the axis.
_MAX_DRAWN = 1e30

_COLOUR_CLASSES = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def series_classes(i: int) -> str:
    """The CSS classes of the i-th series: eight colours, then the same ones with other dashes."""
    colour, repetition = _COLOUR_CLASSES[i % len(_COLOUR_CLASSES)], i // len(_COLOUR_CLASSES)
    return colour if not repetition else f"{colour} again-{1 + (repetition - 1) % 3}"


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        style: CSS classes that set colour and dashes.
        paths: SVG points of each unbroken stretch.
        dots: SVG paths of single values between gaps.
        values: Its value at each position of the chart, as text; empty if it is unknown.
    """

    name: str
    style: str
    paths: tuple[str, ...]
    dots: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """Curves over the same positions of the x axis.

    Attributes:
        key: Part of its HTML ids.
        summary: A sentence with the latest values, for screen readers.
        x_title: Name of the x axis, such as `round`.
        positions: Positions on the x axis, as text; `plot_x` has them in units of the plot.
        marks_x: Labels of the x axis, at equal distances.
        marks_y: Labels of the y axis, at equal distances from the top.
        grid_lines: Heights of the grid lines, in units of the plot.
    """

    key: str
    title: str
    summary: str
    x_title: str
    positions: tuple[str, ...]
    plot_x: tuple[float, ...]
    marks_x: tuple[str, ...]
    marks_y: tuple[str, ...]
    grid_lines: tuple[float, ...]
    curves: tuple[Curve, ...]

    @property
    def values(self) -> list[list[str]]:
        """Per place the value of every curve."""
        return [[c.values[i] for c in self.curves] for i in range(len(self.positions))]

    @property
    def table_rows(self) -> list[tuple[str, list[str]]]:
        """Rows of the table of values, the latest first."""
        return list(zip(self.positions, self.values, strict=True))[: -MAX_TABLE_ROWS - 1 : -1]


@dataclass(frozen=True)
class ChannelRun:
    """Neighbouring channels of one level of the heat map's scale."""

    x: int
    width: int
    level: int


@dataclass(frozen=True)
class Strip:
    """A channel group as a strip of a heat map: its runs, and the least and the mean share over its channels."""

    name: str
    channels: int
    runs: tuple[ChannelRun, ...]
    min_share: float
    mean: float


def lay_out_chart(
    key: str,
    title: str,
    positions: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    format_value: Callable[[float], str],
    *,
    unit: tuple[float, str] = (1.0, ""),
    x_title: str = "round",
    top: float | None = None,
    from_zero: bool = False,
    bridges_gaps: bool = False,
    is_amount_axis: bool = False,
) -> Chart | None:
    """Lay out curves; None if there is no value to show.

    Args:
        positions: Positions on the x axis, ascending.
        series: Per curve its value at every position.
        unit: Size and name of the y axis' unit.
        top: The largest possible value, such as 1 for shares.
        bridges_gaps: Whether a curve goes straight over positions at which it has no value, rather than breaking there.
        is_amount_axis: Whether the x axis begins at zero and has round labels, as for bytes and seconds.
    """
    # Counted from the end, so that the latest point is always among those that stay.
    thinning = max(1, math.ceil(len(positions) / MAX_CURVE_POINTS))
    shown_indices = [i for i in range(len(positions)) if (len(positions) - 1 - i) % thinning == 0]
    positions = [positions[i] for i in shown_indices]
    series = {name: [values[i] for i in shown_indices] for name, values in series.items()}
    series = {name: [v if v is not None and abs(v) < _MAX_DRAWN else None for v in vs] for name, vs in series.items()}
    present_values = [v for values in series.values() for v in values if v is not None]
    if not present_values:
        return None
    if from_zero:
        present_values.append(0.0)
    ticks = [unit[0] * t for t in _ticks(min(present_values) / unit[0], max(present_values) / unit[0], top)]
    low, high = ticks[0], ticks[-1]
    if is_amount_axis:
        marks = _ticks(0.0, max(positions[-1], 0.0), None)
        axis_start, axis_end, marks_x = 0.0, marks[-1], tuple(f"{t:,.6g}" for t in marks)
    else:
        axis_start, axis_end, steps = _whole_number_axis(positions[0], positions[-1])
        marks_x = _axis_labels(axis_start, axis_end, steps)
    span = axis_end - axis_start
    plot_x = tuple(round(WIDTH * (x - axis_start) / span, 1) if span > 0 else WIDTH / 2 for x in positions)
    curves = []
    for i, (name, values) in enumerate(series.items()):
        points = [
            (x, None if v is None else round(HEIGHT * (high - v) / (high - low), 2))
            for x, v in zip(plot_x, values, strict=True)
            if v is not None or not bridges_gaps
        ]
        paths, dots = _stretches(points)
        curves.append(
            Curve(name, series_classes(i), paths, dots, tuple("" if v is None else format_value(v) for v in values))
        )
    latest = ", ".join(f"{c.name} {last_value(c.values)}" for c in curves[:MAX_TABLE_CURVES])
    return Chart(
        key=key,
        title=title,
        summary=f"{title} by {x_title}, {x_title} {_number_text(axis_start)} to {_number_text(positions[-1])}. "
        f"Latest: {latest}.",
        x_title=x_title,
        positions=tuple(_number_text(x) for x in positions),
        plot_x=plot_x,
        marks_x=marks_x,
        marks_y=tuple(f"{round(t / unit[0], 9):,.7g}{unit[1]}" for t in reversed(ticks)),
        grid_lines=tuple(round(HEIGHT * (high - t) / (high - low), 2) for t in ticks[1:]),
        curves=tuple(curves),
    )


def share_strip(name: str, shares: Sequence[float] | npt.NDArray[np.float64]) -> Strip:
    """A strip of one share per channel, from 0 to 1; of many channels a tile shows the mean of some."""
    values = np.clip(np.asarray(shares, np.float64), 0, 1)
    count = min(MAX_TILES, values.size)
    edges = np.linspace(0, values.size, count + 1).round().astype(np.int64)
    means = np.add.reduceat(values, edges[:-1]) / np.diff(edges) if count else values
    return coverage_strip(name, count, [{"channels": 1, "share": float(share)} for share in means])


def merge_curves(
    curves: Mapping[str, Sequence[tuple[float, float | None]]],
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Merge curves with positions of their own into the positions and series of one chart that bridges gaps."""
    positions = sorted({x for points in curves.values() for x, _ in points})
    values_by_curve = {name: dict(points) for name, points in curves.items()}
    return positions, {name: [values.get(x) for x in positions] for name, values in values_by_curve.items()}


def coverage_strip(name: str, channels: int, channel_runs: Iterable[Mapping[str, Any]]) -> Strip:
    """Lay out one group of the coverage; `channel_runs` are runs that the same share of the devices (or updates)
    holds."""
    runs: list[ChannelRun] = []
    start, share_sum, min_share = 0, 0.0, 1.0
    for run in channel_runs:
        count, share = min(int(run["channels"]), channels - start), float(run["share"])
        if count <= 0:
            continue
        # Level 0 is for channels that nobody holds, so that a gap in the coverage never looks like a small share.
        level = max(1, math.ceil(share * LEVELS - 1e-9)) if share > 0 else 0
        if runs and runs[-1].level == level:
            runs[-1] = ChannelRun(runs[-1].x, runs[-1].width + count, level)
        else:
            runs.append(ChannelRun(start, count, level))
        start, share_sum, min_share = start + count, share_sum + count * share, min(min_share, share)
    return Strip(name, channels, tuple(runs), min_share if start else 0.0, share_sum / start if start else 0.0)


def _stretches(points: Sequence[tuple[float, float | None]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """SVG points of a line's unbroken stretches, and paths of zero length for its single values."""
    groups = groupby(points, lambda point: point[1] is not None)
    stretches = [[f"{x:g},{y:g}" for x, y in group] for has_values, group in groups if has_values]
    return tuple(" ".join(s) for s in stretches if len(s) > 1), tuple(f"M{s[0]}h0" for s in stretches if len(s) == 1)


def _ticks(low: float, high: float, top: float | None) -> list[float]:
    """Two to six round numbers at equal distances that enclose these values; none above `top` unless a value is."""
    top = None if top is not None and high > top else top
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = abs(high) * 0.1 or 1.0
        low, high = (low, high + room) if low == 0 else (low - room, high + room)
    if top is not None:
        high = min(high, top)
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    # A billionth is rounding: without it 0.3 / 0.1 would end one tick too early.
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if top is not None:
        last = min(last, math.ceil(top / step - 1e-9))
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def _whole_number_axis(first: float, last: float) -> tuple[float, float, int]:
    """Start, end and number of equal steps of an axis of whole numbers, which ends as soon after `last` as it can."""
    span = last - first
    if span < 3 or not float(span).is_integer():
        return first, last, max(1, int(span))
    steps = min((5, 4, 6, 3), key=lambda n: -span % n)
    return first, last + -span % steps, steps


def _axis_labels(first: float, last: float, steps: int) -> tuple[str, ...]:
    if last <= first:
        return ("", _number_text(first), "")
    return tuple(_number_text(first + (last - first) * k / steps) for k in range(steps + 1))


def _number_text(x: float) -> str:
    return f"{x:,.1f}" if not float(x).is_integer() else f"{int(x):,}"


def last_value(values: Sequence[str]) -> str:
    """The latest value of a curve as text, `unknown` if it has none."""
    return next((v for v in reversed(values) if v), "unknown")
