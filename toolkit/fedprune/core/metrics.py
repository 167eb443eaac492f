"""Metrics that devices report: what they mean, which of them count, and which limits they must keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Endings of `accuracy_...`, `loss_...` and the like: measured on the device's own test samples, with the model that it
# has just trained, or with its own average of models where it keeps one.
TRAINED, AVERAGED = "after", "average"

# The share of received weights in the model that a device serves, reported where validation samples decide on it.
BLEND = "blend"

# The largest loss, of either sign, that counts as a measurement.
MAX_LOSS = 1e6


@dataclass(frozen=True)
class Metric:
    """A measure of a model's outputs.

    Attributes:
        title: Its name for people.
        higher: Whether more is better.
        share: Whether it is a share from 0 to 1, shown in percent.
        labels: The kinds of labels (`fedprune.model.recipe.LOSSES`) that a recipe may ask for it with.
    """

    name: str
    title: str
    higher: bool
    share: bool
    labels: tuple[str, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """Least and greatest value that count as measurements."""
        return (0.0, 1.0) if self.share else (-MAX_LOSS, MAX_LOSS)

    def best(self, values: Iterable[float]) -> float:
        return max(values) if self.higher else min(values)

    def best_index(self, values: Sequence[float | None]) -> int | None:
        """Index of the best value, the first of equals; None without any."""
        measured = [value for value in values if value is not None]
        return values.index(self.best(measured)) if measured else None

    def shown(self, value: float) -> str:
        """The number alone."""
        return f"{value:.1%}" if self.share else f"{value:.4g}"

    def said(self, value: float) -> str:
        """The number with the metric's title."""
        return f"{self.title} {self.shown(value)}"


# The name of a metric that the model itself defines.
SCORE = "score"

ACCURACY = Metric("accuracy", "accuracy", higher=True, share=True)
LOSS = Metric("loss", "loss", higher=False, share=False)

# By name; where several were measured, a model is judged by the first of them.
METRICS = {
    m.name: m
    for m in (
        Metric(SCORE, SCORE, higher=True, share=False),
        Metric("miou", "mean IoU", higher=True, share=True, labels=("classes", "own")),
        Metric("ap", "average precision", higher=True, share=True, labels=("multi", "own")),
        Metric("perplexity", "perplexity", higher=False, share=False, labels=("classes", "own")),
        Metric("rmse", "RMSE", higher=False, share=False, labels=("values", "own")),
        Metric("mae", "MAE", higher=False, share=False, labels=("values", "own")),
        ACCURACY,
        LOSS,
    )
}


def leading(metrics: Mapping[str, float], suffix: str = "") -> tuple[Metric, float] | None:
    """By what a model is judged: the first of `METRICS` that was measured, as `NAME` + `suffix`; None without any."""
    for name, metric in METRICS.items():
        if (value := metrics.get(name + suffix)) is not None:
            return metric, value
    return None


def served(metrics: Mapping[str, float], kind: str) -> float | None:
    """A metric (such as `accuracy` or `loss`) on the device's test samples of the model that it serves; None where it
    wasn't measured.

    That is the average where the device keeps one, else what it trained.
    """
    return metrics.get(f"{kind}_{AVERAGED}", metrics.get(f"{kind}_{TRAINED}"))


def all_served(metrics: Mapping[str, float]) -> dict[str, float]:
    """Every metric of the model that a device serves, by name."""
    return {name: value for name in METRICS if (value := served(metrics, name)) is not None}


def believable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite, with shares (`accuracy...`) from 0 to 1 and others (`loss...`) within `MAX_LOSS`.

    Densities and the end of training depend on them, so that impossible ones must not count.
    """
    found = {}
    for name, value in metrics.items():
        known = METRICS.get(name.split("_")[0])
        low, high = (-math.inf, math.inf) if known is None else known.limits
        if math.isfinite(value) and low <= value <= high:
            found[name] = value
    return found
