"""Pictures as SVG: which channels of every group are kept, how wide every layer is, what a step's pieces take.

They are drawn with nothing but text, so that a report needs no other file and no drawing library.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedprune.architecture import Architecture, Layer
from fedprune.selection import Selection

_LABEL = 170.0
_BAR = 540.0
_NOTE = 150.0
_ROW = 18.0
_HEIGHT = 12.0
_BINS = 140
"""Cells of a bar at most: more would be narrower than a dot of the screen, and make the page huge."""

_LETTERS = 26
"""Of a label, whose end says more than its beginning."""

_SHADES = 4
"""Steps between a cell that is cut and one that is kept, where a cell stands for several channels."""


def channel_bars(selection: Selection) -> str:
    """One bar per channel group, all equally long: kept channels dark, cut ones light, in the model's own order.

    Args:
        selection: What is kept.
    """
    architecture = selection.architecture
    rows = []
    for i, (group, width) in enumerate(zip(architecture.groups, selection.widths, strict=True)):
        kept = np.zeros(group.size, np.bool_)
        kept[selection.ranks[i][:width]] = True
        y = i * _ROW
        members = architecture.summary(i)
        home = members[0].partition("[")[0].removesuffix(".weight") if members else ""
        title = f"{group.name}: {', '.join(members[:8])}"
        rows.append(
            f"<g><title>{_text(title)}</title>"
            f"{_label(home, y, f'{group.name} ')}"
            f'<rect class="cut" x="{_LABEL:g}" y="{y + 3:g}" width="{_BAR:g}" height="{_HEIGHT:g}"/>'
            f"{_cells(kept, y + 3)}"
            f"{_note(f'{width:,} of {group.size:,}', y)}</g>"
        )
    return _svg(rows, "Kept channels of every group")


def layer_widths(architecture: Architecture, widths: Sequence[int]) -> str:
    """One bar per layer: as long as its output channels, whole at full width, dark as cut.

    Args:
        architecture: The whole model.
        widths: Kept channels per group.
    """
    sizes = [
        (layer.name, layer.weight, *_outputs(architecture, widths, layer))
        for layer in architecture.layers
        if layer.weight in architecture.by_name
    ]
    widest = max((full for *_, full, _ in sizes), default=1)
    rows = []
    for i, (name, weight, full, now) in enumerate(sizes):
        y = i * _ROW
        rows.append(
            f"<g><title>{_text(f'{name} ({weight})')}</title>"
            f"{_label(weight.removesuffix('.weight'), y)}"
            f'<rect class="cut" x="{_LABEL:g}" y="{y + 3:g}" width="{_BAR * full / widest:.4g}" height="{_HEIGHT:g}"/>'
            f'<rect class="kept" x="{_LABEL:g}" y="{y + 3:g}" width="{_BAR * now / widest:.4g}" height="{_HEIGHT:g}"/>'
            f"{_note(f'{full:,} → {now:,}' if now != full else f'{full:,}', y)}</g>"
        )
    return _svg(rows, "Output channels of every layer, before and after")


def times(rows: Sequence[tuple[str, float, float | None]]) -> str:
    """One bar per piece of a step: what it took, and dark in it the least that it can take.

    Args:
        rows: What the piece is called, the least seconds, and the measured ones if there are any.
    """
    longest = max((max(least, took or 0.0) for _, least, took in rows), default=0.0) or 1.0
    bars = []
    for i, (name, least, took) in enumerate(rows):
        y = i * _ROW
        parts = [least] if took is None else [took, least]
        note = f"{' of '.join(f'{1000 * seconds:.3g}' for seconds in parts)} ms"
        bars.append(
            f"<g><title>{_text(f'{name}: {note}')}</title>{_label(name, y)}"
            f'<rect class="cut" x="{_LABEL:g}" y="{y + 3:g}" width="{_BAR * (took or 0) / longest:.4g}" '
            f'height="{_HEIGHT:g}"/>'
            f'<rect class="kept" x="{_LABEL:g}" y="{y + 5:g}" width="{_BAR * least / longest:.4g}" '
            f'height="{_HEIGHT - 4:g}"/>'
            f"{_note(note, y)}</g>"
        )
    return _svg(bars, "Time of every piece of a step, and the least that it can be")


def _outputs(architecture: Architecture, widths: Sequence[int], layer: Layer) -> tuple[int, int]:
    """Output channels of a layer at full width and as cut."""
    axes = architecture.by_name[layer.weight].axes
    if not axes:
        return 1, 1
    axis = axes[layer.output_axis]
    return axis.length, axis.size(widths, architecture.sizes)


def _cells(kept: npt.NDArray[np.bool_], y: float) -> str:
    """Kept channels of a bar as one path per shade."""
    bins = min(_BINS, kept.size)
    edges = np.linspace(0, kept.size, bins + 1).round().astype(np.int64)
    share = np.add.reduceat(kept, edges[:-1], dtype=np.int64) / np.diff(edges)
    shade = np.ceil(share * _SHADES).astype(np.int64)
    paths = []
    for level in range(1, _SHADES + 1):
        runs = _runs(shade == level)
        if runs:
            step = _BAR / bins
            lines = "".join(
                f"M{_LABEL + step * a:.5g} {y:g}h{step * (b - a):.4g}v{_HEIGHT:g}h{step * (a - b):.4g}z"
                for a, b in runs
            )
            paths.append(f'<path class="kept" fill-opacity="{level / _SHADES:g}" d="{lines}"/>')
    return "".join(paths)


def _runs(marks: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where runs of true begin and end."""
    steps = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in steps.reshape(-1, 2)]


def _label(text: str, y: float, first: str = "") -> str:
    most = _LETTERS - len(first)
    short = text if len(text) <= most else "…" + text[1 - most :]
    return f'<text x="{_LABEL - 6:g}" y="{y + 13:g}" text-anchor="end">{_text(first + short)}</text>'


def _note(text: str, y: float) -> str:
    return f'<text class="note" x="{_LABEL + _BAR + 8:g}" y="{y + 13:g}">{_text(text)}</text>'


def _svg(rows: Sequence[str], title: str) -> str:
    width, height = _LABEL + _BAR + _NOTE, max(1, len(rows)) * _ROW
    return (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{_text(title)}</title>{"".join(rows)}</svg>'
    )


def _text(text: str) -> str:
    """Text of a model as text of a page: escaped, without characters that XML forbids."""
    return html.escape("".join(c if c.isprintable() else "�" for c in text))
