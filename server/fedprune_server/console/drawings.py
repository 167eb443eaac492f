"""What the console draws: curves, strips of channels, and their numbers as text. Templates put the shapes into SVG.

Everything is laid out here, so that pages need no script to show it; nothing here makes markup, which only templates
do, and they escape it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 1000
HEIGHT = 100
"""The plot's own units; it is stretched to the room that there is."""

MOST_POINTS = 500
"""Points of a curve; of longer ones every so-manieth is drawn."""

MOST_NUMBERS = 60
"""Rows of a table beside a curve; the latest are shown."""

LEVELS = 10
"""Steps of the heat map's scale above nothing."""

_DRAWABLE = 1e30
"""Values beyond this are left out, as those that are no numbers."""

_STYLES = ("one", "two", "three")


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: What it shows.
        style: One of `_STYLES`: colour and dashes.
        paths: The points of each unbroken stretch, as SVG has them.
        dots: Where a value stands alone, with nothing beside it.
        values: What it shows at each of the chart's places, as text; empty where nothing is known.
    """

    name: str
    style: str
    paths: tuple[str, ...]
    dots: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """Curves over the same places.

    Attributes:
        key: A word for its ids.
        title: What it shows.
        summary: The same in a sentence with the latest values, for who doesn't see it.
        along: What the places are (`round`).
        places: Their names.
        at: Where each is in the plot, in its units.
        marks_x: Texts at equal distances below.
        marks_y: Texts at equal distances beside, from the top.
        rules: Heights of the lines behind, in the plot's units.
        curves: The lines.
    """

    key: str
    title: str
    summary: str
    along: str
    places: tuple[str, ...]
    at: tuple[float, ...]
    marks_x: tuple[str, ...]
    marks_y: tuple[str, ...]
    rules: tuple[float, ...]
    curves: tuple[Curve, ...]

    @property
    def values(self) -> list[list[str]]:
        """What every curve shows, place by place."""
        return [[c.values[i] for c in self.curves] for i in range(len(self.places))]

    @property
    def numbers(self) -> list[tuple[str, list[str]]]:
        """Rows of its table, the latest first."""
        rows = list(zip(self.places, self.values, strict=True))
        return rows[: -MOST_NUMBERS - 1 : -1]


@dataclass(frozen=True)
class Run:
    """Neighbouring channels that look alike: where they begin, how many, and their step of the scale."""

    x: int
    width: int
    level: int


@dataclass(frozen=True)
class Strip:
    """A channel group as a strip.

    Attributes:
        name: The group.
        channels: How many it has.
        runs: Its stretches.
        least: The least share of the devices that holds a channel of it.
        mean: The mean share.
    """

    name: str
    channels: int
    runs: tuple[Run, ...]
    least: float
    mean: float


def chart(
    key: str,
    title: str,
    places: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    said: Callable[[float], str],
    *,
    unit: tuple[float, str] = (1.0, ""),
    along: str = "round",
    top: float | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """Lay out curves.

    Args:
        key: A word for ids.
        title: What it shows.
        places: Numbers along the x axis, growing.
        series: Values at them by name, at most three.
        said: A value as text.
        unit: What one of the y axis is, and its name.
        along: What the places are.
        top: What no value can exceed, such as 1 for shares.
        from_zero: Whether the y axis begins at zero.

    Returns:
        The chart; None where there is nothing to draw.
    """
    stride = max(1, math.ceil(len(places) / MOST_POINTS))
    drawn = [i for i in range(len(places)) if (len(places) - 1 - i) % stride == 0]
    places = [places[i] for i in drawn]
    series = {name: [values[i] for i in drawn] for name, values in series.items()}
    series = {name: [v if v is not None and abs(v) < _DRAWABLE else None for v in vs] for name, vs in series.items()}
    known = [v for values in series.values() for v in values if v is not None]
    if not known:
        return None
    if from_zero:
        known.append(0.0)
    ticks = [unit[0] * t for t in _ticks(min(known) / unit[0], max(known) / unit[0], top)]
    low, high = ticks[0], ticks[-1]
    first, last, parts = _axis(places[0], places[-1])
    at = tuple(round(WIDTH * (x - first) / (last - first), 1) if last > first else WIDTH / 2 for x in places)
    curves = []
    for (name, values), style in zip(series.items(), _STYLES, strict=False):
        heights = [None if v is None else round(HEIGHT * (high - v) / (high - low), 2) for v in values]
        paths, dots = _stretches(at, heights)
        curves.append(Curve(name, style, paths, dots, tuple("" if v is None else said(v) for v in values)))
    latest = ", ".join(f"{c.name} {_last(c.values)}" for c in curves)
    return Chart(
        key=key,
        title=title,
        summary=f"{title} by {along}, {along} {_whole(first)} to {_whole(places[-1])}. Latest: {latest}.",
        along=along,
        places=tuple(_whole(x) for x in places),
        at=at,
        marks_x=_marks(first, last, parts),
        marks_y=tuple(f"{round(t / unit[0], 9):,.7g}{unit[1]}" for t in reversed(ticks)),
        rules=tuple(round(HEIGHT * (high - t) / (high - low), 2) for t in ticks[1:]),
        curves=tuple(curves),
    )


def strip(name: str, channels: int, held: Iterable[Mapping[str, Any]]) -> Strip:
    """Lay out one group of the coverage.

    Args:
        name: The group.
        channels: How many channels it has.
        held: Runs of `channels` that the same `share` of the devices holds.
    """
    runs: list[Run] = []
    at, weighed, least = 0, 0.0, 1.0
    for run in held:
        count, share = min(int(run["channels"]), channels - at), float(run["share"])
        if count <= 0:
            continue
        level = max(1, math.ceil(share * LEVELS - 1e-9)) if share > 0 else 0
        if runs and runs[-1].level == level:
            runs[-1] = Run(runs[-1].x, runs[-1].width + count, level)
        else:
            runs.append(Run(at, count, level))
        at, weighed, least = at + count, weighed + count * share, min(least, share)
    return Strip(name, channels, tuple(runs), least if at else 0.0, weighed / at if at else 0.0)


def _stretches(at: Sequence[float], heights: Sequence[float | None]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Unbroken stretches of a line as SVG's points, and points that stand alone as a path of no length."""
    paths: list[str] = []
    dots: list[str] = []
    now: list[str] = []
    for x, y in zip(at, heights, strict=True):
        if y is None:
            _close(now, paths, dots)
            now = []
        else:
            now.append(f"{x:g},{y:g}")
    _close(now, paths, dots)
    return tuple(paths), tuple(dots)


def _close(points: list[str], paths: list[str], dots: list[str]) -> None:
    if len(points) == 1:
        dots.append(f"M{points[0]}h0")
    elif points:
        paths.append(" ".join(points))


def _ticks(low: float, high: float, top: float | None) -> list[float]:
    """Round numbers at equal distances round these values: two to six of them, none above `top` unless a value is."""
    top = None if top is not None and high > top else top
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = abs(high) * 0.1 or 1.0
        low, high = (low, high + room) if low == 0 else (low - room, high + room)
    if top is not None:
        high = min(high, top)
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(f * size for f in (1, 2, 2.5, 5, 10) if f * size >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if top is not None:
        last = min(last, math.ceil(top / step - 1e-9))
    return [k * step for k in range(first, max(last, first + 1) + 1)]


def _axis(first: float, last: float) -> tuple[float, float, int]:
    """From where to where an axis of whole numbers goes, and in how many equal steps: it ends as soon as it can."""
    way = last - first
    if way < 3 or not float(way).is_integer():
        return first, last, max(1, int(way))
    parts = min((5, 4, 6, 3), key=lambda n: -way % n)
    return first, last + -way % parts, parts


def _marks(first: float, last: float, parts: int) -> tuple[str, ...]:
    """Numbers at equal distances."""
    if last <= first:
        return ("", _whole(first), "")
    return tuple(_whole(first + (last - first) * k / parts) for k in range(parts + 1))


def _whole(x: float) -> str:
    return f"{x:g}" if not float(x).is_integer() else f"{int(x):,}"


def _last(values: Sequence[str]) -> str:
    return next((v for v in reversed(values) if v), "unknown")
