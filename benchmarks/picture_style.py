"""How pictures look, whoever draws them: one style, and colours that everyone can tell apart."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from manual.pictures import stamp

FLEET = "#0072B2"
REFERENCE = "#D55E00"
"""Colours of Okabe and Ito's palette, told apart by everyone; line styles and hatches tell them apart in grey, too."""

_INK = "#24292F"
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8C959F",
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


def styled(*, grid: bool = True) -> AbstractContextManager[None]:
    """What is drawn and saved in this context has the style.

    Args:
        grid: Whether lines behind what is drawn help to read it.
    """
    return plt.rc_context({**_STYLE, "axes.grid": grid})


def save(figure: Figure, path: Path, data: object) -> Path:
    """Write a picture, and let go of it.

    Args:
        figure: The picture.
        path: A file ending in `.png`.
        data: The numbers that it shows, whose digest it carries (`manual.pictures`).

    Returns:
        The file.
    """
    figure.savefig(path)
    plt.close(figure)
    stamp(path, data)
    return path
