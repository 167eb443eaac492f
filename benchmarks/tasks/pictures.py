"""A picture of each task: what the fleet's model makes of samples that no board has, and how the methods learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.picture_style import FLEET, REFERENCE, save, styled
from benchmarks.tasks import data
from benchmarks.tasks.runs import outputs
from benchmarks.tasks.tasks import TASKS
from fedprune.core.metrics import METRICS
from fedprune.model.selection import Tensors
from fedprune_export.pruning.model import Model
from manual.pictures import curves_of_task, ends_of_tasks

Array = np.ndarray[Any, Any]
FOLDER = Path("docs/images")
_MOST = 30.0
"""Percent of FedAvg's score at the edges of the picture of all tasks."""

_COLOURS = {"torch": "#8C959F", "fedavg": REFERENCE, "fedprune": FLEET}


def widths(runs: dict[str, Any]) -> Path:
    """How far methods that give boards widths of their own, or one width to all, end from FedAvg, in all tasks."""
    ends = ends_of_tasks(runs)
    marks = {"one width": ("s", "#8C959F"), "heterofl int8": ("v", REFERENCE), "fedprune": ("o", FLEET)}
    with styled():
        figure, axis = plt.subplots(figsize=(7, 0.5 + 0.4 * len(ends)), layout="constrained")
        for method, (mark, colour) in marks.items():
            gains = [_gain(task, scores[method], scores["fedavg"]) for task, scores in ends.items()]
            axis.plot(gains, range(len(ends)), mark, color=colour, label=method)
        axis.axvline(0, color="#24292F", linewidth=1)
        axis.set_yticks(range(len(ends)), list(ends))
        axis.invert_yaxis()
        axis.set_xlim(-_MOST, _MOST)
        axis.set_xlabel("score next to that of FedAvg at full width, % (right is better)")
        axis.legend()
        return save(figure, FOLDER / "tasks-widths.png", ends)


def _gain(task: str, score: float, reference: float) -> float:
    """By how many percent of it a score is better than another one."""
    change = 100 * (score - reference) / abs(reference)
    better = change if METRICS[TASKS[task].recipe.judged_by].higher else -change
    return max(-_MOST, min(_MOST, better))


def curves(axis: Any, runs: dict[str, Any], metric: str) -> None:
    """The global model's metric by rounds: the first seed of every method."""
    for method, colour in _COLOURS.items():
        seeds = runs.get(method)
        if not seeds:
            continue
        curve = seeds[min(seeds)]["curve"]
        axis.plot(range(1, len(curve) + 1), curve, label=method, color=colour)
    axis.set_xlabel("round")
    axis.set_title(METRICS[metric].title)
    axis.legend()


def segmentation(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Streets, their labels, and what the model says of each pixel."""
    colours = plt.get_cmap("tab20")(np.arange(12))
    for row, i in enumerate((10, 90, 170)):
        picture = (found.x[i].transpose(1, 2, 0) + 1) / 2
        for axis, shown in zip(
            axes[row * 3 :], (picture, colours[found.y[i]], colours[made[i].argmax(0)]), strict=False
        ):
            axis.imshow(shown)
            axis.axis("off")
    for axis, title in zip(axes, ("street", "labels", "fedprune"), strict=False):
        axis.set_title(title)


def detection(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Canvases with the boxes of which the model is sure."""
    for axis, i in zip(axes, range(9), strict=False):
        axis.imshow(found.x[i, 0], cmap="gray_r")
        sure = 1 / (1 + np.exp(-made[i, 0]))
        box = 1 / (1 + np.exp(-made[i, 1:5]))
        for row, column in zip(*np.nonzero(sure > 0.5), strict=True):
            x, y = (column + box[0, row, column]) * 8, (row + box[1, row, column]) * 8
            wide, high = box[2:, row, column] * 32
            axis.add_patch(plt.Rectangle((x - wide / 2, y - high / 2), wide, high, fill=False, color=FLEET))
            axis.text(x - wide / 2, y - high / 2, str(made[i, 5:, row, column].argmax()), color=FLEET)
        axis.axis("off")


def forecasting(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Oil temperature: two days that the model sees, four that it foretells."""
    for axis, i in zip(axes, np.linspace(0, len(made) - 1, 3).astype(int), strict=False):
        axis.plot(np.arange(-48, 0), found.x[i, -1, -48:], color="gray")
        axis.plot(np.arange(96), found.y[i, -1], color="gray", linestyle=":", label="measured")
        axis.plot(np.arange(96), made[i, -1], color=FLEET, label="foretold")
        axis.set_xlabel("hours")
    axes[0].legend()


def anomalies(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Errors of windows that are usual, and of the activity that no board has: `made` are the outputs of both."""
    x, strange = data.unusual()
    error = ((made - x) ** 2).mean((1, 2))
    bins = np.geomspace(error.min(), error.max(), 40).tolist()
    axes[0].hist([error[~strange], error[strange]], bins, label=["known", "walking upstairs"], density=True)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("squared error")
    axes[0].legend()


def embedding(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Two main directions of the embeddings, coloured by kind."""
    direction = made / np.linalg.norm(made, axis=1, keepdims=True)
    _, _, main = np.linalg.svd(direction - direction.mean(0), full_matrices=False)
    at = direction @ main[:2].T
    axes[0].scatter(*at.T, c=found.y, cmap="tab10", s=4)
    axes[0].axis("off")


def confusion(made: Array, found: data.Dealt, axes: list[Any]) -> None:
    """Which class is taken for which."""
    count = made.shape[1]
    table = np.zeros((count, count))
    np.add.at(table, (found.y, made.argmax(1)), 1)
    axes[0].imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    axes[0].set_xlabel("guess")
    axes[0].set_ylabel("class")


DRAWN: dict[str, tuple[Callable[[Array, data.Dealt, list[Any]], None], tuple[int, int], int]] = {
    "speech": (confusion, (1, 1), 10_000),
    "segmentation": (segmentation, (3, 3), 200),
    "detection": (detection, (3, 3), 9),
    "forecasting": (forecasting, (3, 1), 10_000),
    "forecasting-lstm": (forecasting, (3, 1), 10_000),
    "anomalies": (anomalies, (1, 1), 10_000),
    "fusion": (confusion, (1, 1), 10_000),
    "embedding": (embedding, (1, 1), 2_000),
}
"""How each task's outputs are drawn, in how many rows and columns, and for how many samples."""


def draw(name: str, model: Model, weights: Tensors, found: data.Dealt, runs: dict[str, Any], metric: str) -> Path:
    """Write a task's picture."""
    drawing, (rows, columns), most = DRAWN.get(name, (None, (0, 0), 0))
    with styled(grid=False):
        figure = plt.figure(figsize=(9, 3.6), layout="constrained")
        parts = figure.subfigures(1, 2 if drawing else 1, squeeze=False)[0]
        curves(parts[0].subplots(), runs, metric)
        if drawing:
            x = data.unusual()[0] if name == "anomalies" else found.x[:most]
            drawing(outputs(model, weights, x), found, list(np.ravel(parts[1].subplots(rows, columns))))
        return save(figure, FOLDER / f"task-{name}.png", curves_of_task(runs))
