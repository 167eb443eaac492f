"""Pictures of a run: how it learnt, who held which channels, what went over the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedprune_server.record import Record, RoundRow

FLEET = "#0072B2"
REFERENCE = "#D55E00"
"""Colours of Okabe and Ito's palette, told apart by everyone; line styles and hatches tell them apart in grey, too."""

_GROUPS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
_EMPTY = "#EBEDF0"
_INK = "#24292F"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8C959F",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E1E4E8",
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}

Values = Callable[[Record], "Sequence[float | None]"]
"""A number per round, None where there is none."""


def curves(run: Record, reference: Record | None, path: Path) -> Path:
    """Global and mean local accuracy (or loss), against rounds and against bytes."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), sharey="row", layout="constrained")
        rows: tuple[tuple[str, Values], ...] = (
            ("Global model, server's test data", lambda record: record.global_values()),
            ("Devices' own models, own test data (mean)", lambda record: record.mean_locals()),
        )
        for (title, values), line in zip(rows, axes, strict=True):
            _curve(line[0], run, reference, values, lambda r: r.round)
            _curve(line[1], run, reference, values, lambda r: (r.down + r.up) / 1e6)
            line[0].set_title(title)
            line[0].set_ylabel(run.measure)
            if run.measure == "accuracy":
                line[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            line[0].set_xlabel("round")
            line[0].xaxis.set_major_locator(MaxNLocator(integer=True))
            line[1].set_xlabel("MB sent so far, down and up")
            line[1].set_xlim(left=0)
        if reference is not None:
            axes[0][0].legend(loc="lower right", frameon=False)
        return _save(figure, path)


def traffic(run: Record, reference: Record | None, path: Path) -> Path:
    """Bytes down and up, beside the reference's."""
    runs = [run] + ([reference] if reference is not None else [])
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(8, 1.3 + 0.9 * len(runs)), layout="constrained")
        height = 0.36
        for i, (each, colour) in enumerate(zip(runs, (FLEET, REFERENCE), strict=False)):
            for j, (label, amount) in enumerate((("down", each.last.down), ("up", each.last.up))):
                at = i + (j - 0.5) * height
                axis.barh(at, amount / 1e6, height * 0.9, color=colour, alpha=1 if j == 0 else 0.6)
                base = getattr(reference.last, label) if reference is not None and each is run else 0
                share = f"  ({amount / base:.0%} of {reference.title})" if base and reference is not None else ""
                axis.text(amount / 1e6, at, f" {label} {amount / 1e6:.1f} MB{share}", va="center")
        axis.set_yticks(range(len(runs)), [r.title for r in runs])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"MB in {len(run.rounds)} rounds ({run.measured})" if run.measured else "MB")
        axis.set_title("Bytes between server and devices")
        axis.set_xlim(0, 1.35 * max(max(r.last.down, r.last.up) for r in runs) / 1e6 or 1)
        return _save(figure, path)


def channel_map(run: Record, path: Path) -> Path:
    """Which channels of every group each device holds in the last round: a row per device, a tile per channel."""
    names = [d.name for d in run.devices if d.name in run.channels]
    sizes = [size for _, size in run.groups]
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        columns = max(len(sizes), 1)
        figure, axes = plt.subplots(
            1,
            columns,
            figsize=(11.5, 1.4 + 0.42 * max(len(names), 1)),
            width_ratios=[max(s, 12) for s in sizes] or [1],
            layout="constrained",
            squeeze=False,
        )
        for g, axis in enumerate(axes[0]):
            if g < len(sizes):
                _tiles(axis, [run.channels[n][g] for n in names], sizes[g], _GROUPS[g % len(_GROUPS)])
                axis.set_title(f"{run.groups[g][0]} ({sizes[g]})", fontsize=9)
            axis.set_yticks(range(len(names)), names if g == 0 else [""] * len(names))
        figure.suptitle(
            "Channels that each device holds in the last round (coloured = held)", x=0.01, ha="left", fontweight="bold"
        )
        figure.supxlabel("channel of the global model", fontsize=10)
        return _save(figure, path)


def local_bars(run: Record, reference: Record | None, path: Path) -> Path:
    """Every device's own accuracy (or loss) as measured last, beside the reference's; a dash where it never was."""
    names = [d.name for d in run.devices]
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
        runs = [(run, FLEET, "")] + ([(reference, REFERENCE, "//")] if reference is not None else [])
        width = 0.8 / len(runs)
        for i, (each, colour, hatch) in enumerate(runs):
            at = {name: k + (i - (len(runs) - 1) / 2) * width for k, name in enumerate(names)}
            known = {name: value for name, value in each.latest.items() if name in at}
            bars = axis.bar(
                [at[n] for n in known],
                list(known.values()),
                width * 0.92,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=each.title,
            )
            shown = [f"{100 * v:.0f}" if run.measure == "accuracy" else f"{v:.3g}" for v in known.values()]
            axis.bar_label(bars, shown, padding=1, fontsize=8)
            for name in at.keys() - known.keys():
                axis.text(at[name], 0.01, "–", ha="center", fontsize=8)
        densities = {d.name: d.density for d in run.devices}
        axis.set_xticks(range(len(names)), [f"{n}\ndensity {densities[n]:.2f}" for n in names], fontsize=8)
        if run.measure == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ylim(0, 1.12)
        axis.grid(axis="x", visible=False)
        axis.set_ylabel(run.measure)
        axis.set_title("Each device's own model on its own test data, as measured last")
        if reference is not None:
            figure.legend(loc="outside right upper", frameon=False)
        return _save(figure, path)


def _curve(
    axis: Axes, run: Record, reference: Record | None, values: Values, along: Callable[[RoundRow], float]
) -> None:
    shown: Sequence[tuple[Record | None, str, str, str]] = (
        (reference, REFERENCE, "--", "s"),
        (run, FLEET, "-", "o"),
    )
    for each, colour, style, marker in shown:
        if each is not None:
            points = [(along(r), v) for r, v in zip(each.rounds, values(each), strict=True) if v is not None]
            axis.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=colour,
                linestyle=style,
                marker=marker,
                markersize=3.5,
                linewidth=1.8,
                label=each.title,
            )


def _tiles(axis: Axes, rows: Sequence[Sequence[int]], size: int, colour: str) -> None:
    image = [[_rgb(colour if c in held else _EMPTY) for c in range(size)] for held in map(frozenset, rows)]
    if image:
        axis.imshow(image, aspect="auto", interpolation="nearest", extent=(0, size, len(rows) - 0.5, -0.5))
    for i in range(1, len(rows)):
        axis.axhline(i - 0.5, color="white", linewidth=3)
    for c in range(1, size):
        axis.axvline(c, color="white", linewidth=0.5)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=max(2, min(6, size // 12)), integer=True))


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path
