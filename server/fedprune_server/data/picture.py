"""A picture of a partition: who holds how many samples of which class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex

from fedprune_server.data.federation import Federation
from fedprune_server.picture_style import save, styled

_MOST_DEVICES = 60
"""Bars that can still be told apart; of more devices so many are shown, evenly spaced by size."""

_MOST_CLASSES = 20
"""Entries of a legend that can still be read."""


def draw_partition(federation: Federation, path: Path) -> Path:
    """Draw stacked bars, one per device, one colour per class, all splits together.

    Args:
        federation: The data and who holds it.
        path: A file ending in `.png` or `.svg`.

    Returns:
        The file.
    """
    counts = federation.counts()
    shown, names = _shown(counts, federation.names)
    colours = _colours(counts.shape[1])
    with styled(grid=False):
        figure, axis = plt.subplots(figsize=(9, 1.2 + 0.24 * len(shown)), layout="constrained")
        left = np.zeros(len(shown))
        for label, name in enumerate(federation.samples.class_names):
            axis.barh(names, shown[:, label], left=left, color=colours[label], label=name, height=0.82)
            left += shown[:, label]
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.set_xlabel("samples")
        note = "" if len(shown) == len(counts) else f", {len(shown)} of them shown"
        axis.set_title(f"{int(counts.sum()):,} samples on {len(counts)} devices{note}")
        if counts.shape[1] <= _MOST_CLASSES:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="class")
        return save(figure, path)


def partition_table(federation: Federation) -> str:
    """The same as text: a line per device with its samples and the classes that it has most of, as Markdown."""
    counts, names = federation.counts(), federation.samples.class_names
    lines = ["| device | train | validation | test | classes, most first |", "|---|---:|---:|---:|---|"]
    for row, (name, holding) in zip(counts, federation.holdings.items(), strict=True):
        order = [int(c) for c in np.argsort(-row, kind="stable") if row[c]]
        listed = ", ".join(f"{names[c]} {row[c]}" for c in order[:5]) + (", ..." if len(order) > 5 else "")
        lines.append(f"| {name} | {len(holding.train)} | {len(holding.validation)} | {len(holding.test)} | {listed} |")
    return "\n".join(lines) + "\n"


def _shown(counts: npt.NDArray[np.int64], names: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    if len(counts) <= _MOST_DEVICES:
        return counts, list(names)
    order = np.argsort(-counts.sum(1), kind="stable")
    picked = order[np.linspace(0, len(order) - 1, _MOST_DEVICES).round().astype(int)]
    return counts[picked], [names[int(i)] for i in picked]


def _colours(classes: int) -> list[str]:
    """Colours that neighbours in a bar differ by, in lightness too."""
    if classes <= 20:
        return [to_hex(mpl.colormaps["tab20"](i)) for i in range(classes)]
    return [to_hex(mpl.colormaps["viridis"]((i * 7 % classes) / (classes - 1))) for i in range(classes)]
