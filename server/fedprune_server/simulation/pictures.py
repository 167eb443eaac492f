"""Pictures of a run: how it learnt, who held which channels, what went over the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedprune_server.picture_style import FLEET, REFERENCE, save, styled
from fedprune_server.simulation.record import Record, RoundRow, beside

_RUNS = (FLEET, REFERENCE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_GROUPS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#D55E00")
_EMPTY = "#EBEDF0"

DEVICES = 24
"""Pictures show so many devices one by one; of larger fleets some, evenly spread, or all as a histogram."""

GROUPS = 12
"""Channel groups side by side in a picture."""

Values = Callable[[Record], "Sequence[float | None]"]
"""A number per round, None where there is none."""


Along = tuple[str, Callable[[RoundRow], float]]
"""What a curve runs along: a label, and where a round lies on it."""

_ALONG: tuple[Along, ...] = (
    ("round", lambda r: r.round),
    ("MB sent so far, down and up", lambda r: (r.down + r.up) / 1e6),
    ("seconds", lambda r: r.at),
)

MEASURED = 6
"""Most names of what a simulation measured that get curves."""


def curves(runs: Sequence[Record], path: Path) -> Path:
    """Accuracy (or loss) of the global model and of the devices' own, against rounds, bytes and time.

    Args:
        runs: Runs to lay over each other; their titles tell them apart.
        path: Where to.
    """
    rows = _rows(runs)
    with styled():
        figure, axes = plt.subplots(
            len(rows), 3, figsize=(13, 0.6 + 2.9 * len(rows)), sharey="row", layout="constrained", squeeze=False
        )
        for (title, values), line in zip(rows, axes, strict=True):
            for axis, (label, along) in zip(line, _ALONG, strict=True):
                _curves(axis, runs, values, along)
                axis.set_xlabel(label)
                axis.set_xlim(left=0)
            line[0].set_xlim(0.5, max((r.round for run in runs for r in run.rounds), default=1) + 0.5)
            line[0].set_title(title)
            line[0].set_ylabel(runs[0].measure)
            line[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if runs[0].measure == "accuracy":
            _percents([line[0] for line in axes])
        if len(runs) > 1:
            axes[0][0].legend(loc="best", frameon=False, fontsize=8)
        return save(figure, path)


def _rows(runs: Sequence[Record]) -> list[tuple[str, Values]]:
    """What there are curves of: a title, and a run's values."""
    kind = runs[0].measure
    rows: list[tuple[str, Values]] = [
        ("Global model, server's test data", lambda record: record.global_values()),
        ("What devices serve, own test data (mean)", lambda record: record.mean_locals()),
    ]
    for moment in beside(runs):
        title = f"As {'received' if moment == 'before' else 'trained'}, own test data (mean)"
        rows.append((title, partial(Record.own_means, metric=f"{kind}_{moment}")))
    suffix = "_loss" if kind == "loss" else ""
    names: dict[str, None] = {}
    for run in runs:
        for row in run.rounds:
            names |= dict.fromkeys(n for n in row.measured if n.endswith("_loss") == (kind == "loss"))
    shown = sorted(names, key=lambda name: "/" in name)[:MEASURED]  # further sets of samples last
    rows += [(f"Measured: {name.removesuffix(suffix)}", partial(Record.measured_values, name=name)) for name in shown]
    known = [row for row in rows if any(v is not None for run in runs for v in row[1](run))]
    return known or rows[:1]


def traffic(run: Record, reference: Record | None, path: Path) -> Path:
    """Bytes down and up, beside the reference's."""
    runs = [run] + ([reference] if reference is not None else [])
    with styled():
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
        return save(figure, path)


def channel_map(run: Record, path: Path) -> Path:
    """Which channels of every group each device holds in the last round: a row per device, a tile per channel."""
    names = _some([d.name for d in run.devices if d.name in run.channels])
    sizes = [size for _, size in run.groups][:GROUPS]
    with styled(grid=False):
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
        return save(figure, path)


def coverage_map(run: Record, path: Path) -> Path:
    """Which share of a round's updates trained each channel: a row per noted round, a column per channel and group."""
    rows = [r for r in run.rounds if r.coverage]
    with styled(grid=False):
        columns = max(len(run.groups), 1)
        shown = [i for i, (_, size) in enumerate(run.groups) if size > 1][:GROUPS] or list(range(columns))[:1]
        figure, axes = plt.subplots(
            1,
            len(shown),
            figsize=(11.5, 3.4),
            width_ratios=[max(run.groups[g][1], 12) for g in shown] if run.groups else [1],
            layout="constrained",
            squeeze=False,
        )
        image = None
        for axis, g in zip(axes[0], shown, strict=True):
            if rows and run.groups:
                shares = [[c / max(1, r.updates) for c in r.coverage[g]] for r in rows]
                image = axis.imshow(shares, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="cividis")
                axis.set_title(f"{run.groups[g][0]} ({run.groups[g][1]})", fontsize=9)
                places = sorted({0, len(rows) // 2, len(rows) - 1})
                axis.set_yticks(places, [str(rows[p].round) if g == shown[0] else "" for p in places])
            axis.tick_params(length=0, labelsize=8)
        axes[0][0].set_ylabel("round")
        if image is not None:
            bar = figure.colorbar(image, ax=axes[0][-1], format=PercentFormatter(1, decimals=0))
            bar.outline.set_visible(False)
        figure.suptitle("Share of each round's updates that trained a channel", x=0.01, ha="left", fontweight="bold")
        figure.supxlabel("channel of the global model", fontsize=10)
        return save(figure, path)


def local_bars(run: Record, reference: Record | None, path: Path) -> Path:
    """Every device's own accuracy (or loss) as measured last, beside the reference's; a dash where it never was."""
    if len(run.devices) > DEVICES:
        return _histogram(run, reference, path)
    names = [d.name for d in run.devices]
    with styled():
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
        axis.set_xlim(-0.6, len(names) - 0.4)  # also where a device has no bar
        if run.measure == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_ylim(0, 1.12)
        axis.grid(axis="x", visible=False)
        axis.set_ylabel(run.measure)
        axis.set_title("What each device serves, on its own test data, as measured last")
        if reference is not None:
            figure.legend(loc="outside right upper", frameon=False)
        return save(figure, path)


def _curves(axis: Axes, runs: Sequence[Record], values: Values, along: Callable[[RoundRow], float]) -> None:
    for i, run in enumerate(runs):
        points = [(along(r), v) for r, v in zip(run.rounds, values(run), strict=True) if v is not None]
        axis.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=_RUNS[i % len(_RUNS)],
            linestyle=_LINES[i % len(_LINES)],
            marker=_MARKERS[i % len(_MARKERS)] if len(points) <= 60 else None,
            markersize=3.5,
            linewidth=1.8,
            label=run.title,
            zorder=3 - 0.01 * i,
        )


def _percents(axes: Sequence[Axes]) -> None:
    """Show shares as percentages, on all axes with as many decimals as the finest of them needs."""
    for axis in axes:
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ticks = [100 * float(t) for axis in axes for t in axis.get_yticks()]
    decimals = next(d for d in range(4) if d == 3 or all(abs(t - round(t, d)) < 1e-6 for t in ticks))
    for axis in axes:
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def _some(names: list[str]) -> list[str]:
    """A fleet's devices, or some of them, evenly spread."""
    if len(names) <= DEVICES:
        return names
    return [names[i * (len(names) - 1) // (DEVICES - 1)] for i in range(DEVICES)]


def _histogram(run: Record, reference: Record | None, path: Path) -> Path:
    """How many devices have which accuracy (or loss) of their own."""
    runs = [run] + ([reference] if reference is not None else [])
    with styled():
        figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
        axis.hist(
            [list(each.latest.values()) for each in runs],
            bins=20,
            color=[FLEET, REFERENCE][: len(runs)],
            label=[each.title for each in runs],
        )
        if run.measure == "accuracy":
            axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.grid(axis="x", visible=False)
        axis.set_xlabel(run.measure)
        axis.set_ylabel("devices")
        axis.set_title("What devices serve, on their own test data, as measured last")
        if reference is not None:
            axis.legend(frameon=False)
        return save(figure, path)


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
