"""A picture of all tasks: how far methods end from FedAvg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.tasks.tasks import TASKS
from fedprune.core.metrics import METRICS
from manual.pictures import ends_of_tasks, stamp

FILE = Path("docs/images/tasks-widths.png")
MOST = 30.0
"""Percent of FedAvg's score at the edges."""

MARKS = {"one width": ("s", "#8C959F"), "heterofl int8": ("v", "#D55E00"), "fedprune": ("o", "#0072B2")}
"""Colours of Okabe and Ito's palette, which everyone can tell apart."""


def draw(runs: dict[str, Any]) -> Path:
    """How far methods that give boards widths of their own, or one width to all, end from FedAvg, in all tasks."""
    ends = ends_of_tasks(runs)
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}):
        figure, axis = plt.subplots(figsize=(7, 0.5 + 0.4 * len(ends)), layout="constrained")
        for method, (mark, colour) in MARKS.items():
            gains = [gain(task, scores[method], scores["fedavg"]) for task, scores in ends.items()]
            axis.plot(gains, range(len(ends)), mark, color=colour, label=method)
        axis.axvline(0, color="#24292F", linewidth=1)
        axis.set_yticks(range(len(ends)), list(ends))
        axis.invert_yaxis()
        axis.set_xlim(-MOST, MOST)
        axis.set_xlabel("score next to that of FedAvg at full width, % (right is better)")
        axis.legend()
        figure.savefig(FILE)
        plt.close(figure)
    stamp(FILE, ends)
    return FILE


def gain(task: str, score: float, reference: float) -> float:
    """By how many percent of it a score is better than another one."""
    change = 100 * (score - reference) / abs(reference)
    better = change if METRICS[TASKS[task].recipe.judged_by].higher_is_better else -change
    return max(-MOST, min(MOST, better))
