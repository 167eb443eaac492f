"""The swarm's numbers as a picture: how a round grows with the fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.picture_style import FLEET, REFERENCE, save, styled
from manual.pictures import rows_of_swarm

_QUESTIONS = {"call off": ("o", "-"), "say again": ("s", "--")}


def draw(rows: list[dict[str, Any]], path: Path, memory_bar: float = 500, latency_bar: float = 0.25) -> Path:
    """Draw seconds of a round, the server's memory and the latency of control messages by the fleet's size.

    Args:
        rows: What `benchmarks.swarm.run.measure` gave, by size.
        path: A file ending in `.png` or `.svg`.
        memory_bar: What the server is meant to stay below, MB.
        latency_bar: What the 95th percentile is meant to stay below, seconds.

    Returns:
        The file.
    """
    sizes = [row["devices"] for row in rows]
    with styled():
        figure, (rounds, memory, latency) = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
        seconds = [row["rounds"][-1]["round_s"] for row in rows]
        rounds.loglog(sizes, seconds, "o-", color=FLEET, label="measured")
        straight = [seconds[0] * size / sizes[0] for size in sizes]
        rounds.loglog(sizes, straight, ":", color=REFERENCE, label="ten times the devices, ten times as long")
        rounds.set_title("Round of all devices, seconds")
        memory.semilogx(sizes, [row["watched"]["server"]["peak"] / 1e6 for row in rows], "o-", color=FLEET)
        _bar(memory, memory_bar, f"{memory_bar:g} MB")
        memory.set_title("Server memory at most, MB")
        for kind, (marker, line) in _QUESTIONS.items():
            found = [1e3 * row["rounds"][-1]["latency"][kind]["p95"] for row in rows]
            latency.semilogx(sizes, found, marker + line, color=FLEET, label=f"“{kind}”")
        _bar(latency, 1e3 * latency_bar, f"{1e3 * latency_bar:g} ms")
        latency.set_title("Control latency, 95 %, ms")
        for axis in (rounds, memory, latency):
            axis.set_xlabel("devices")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
        for axis in (rounds, latency):
            axis.legend(frameon=False, fontsize=8, loc="upper left" if axis is rounds else "center left")
        return save(figure, path, rows_of_swarm(rows))


def _bar(axis: Axes, value: float, label: str) -> None:
    axis.axhline(value, color=REFERENCE, linestyle=":")
    axis.annotate(
        label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=REFERENCE, fontsize=8
    )
    axis.set_ylim(0, 1.15 * value)
