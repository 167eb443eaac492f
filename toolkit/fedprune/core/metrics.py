"""Metrics that devices report: their names, their valid ranges, and which of them judges a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Suffixes of `accuracy_...`, `loss_...` and the like, which are measured on the device's own test samples: with the
# model that it has just trained, or with its own average of models if it keeps one.
TRAINED_SUFFIX, AVERAGED_SUFFIX = "after", "average"

# The share of samples that a board sets aside for these tests if their source has no test split of its own.
TEST_SHARE = 0.2

# The share of received weights in the model that a device serves, reported where validation samples decide on it.
BLEND = "blend"

# The largest loss, of either sign, that counts as a measurement: larger ones are divergence, and would hide all other
# values in a mean over the fleet.
MAX_LOSS = 1e6


@dataclass(frozen=True)
class Metric:
    """A measure of a model's outputs.

    Attributes:
        is_share: Whether it is a share from 0 to 1, shown in percent.
        labels: The kinds of labels (`fedprune.model.recipe.LOSSES`) that a recipe may ask for it with.
    """

    name: str
    title: str
    higher_is_better: bool
    is_share: bool
    labels: tuple[str, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        """Least and greatest value that count as measurements."""
        return (0.0, 1.0) if self.is_share else (-MAX_LOSS, MAX_LOSS)

    def best(self, values: Iterable[float]) -> float:
        return max(values) if self.higher_is_better else min(values)

    def worst(self, values: Iterable[float]) -> float:
        return min(values) if self.higher_is_better else max(values)

    def best_index(self, values: Sequence[float | None]) -> int | None:
        """The index of the best value, the first of equals; None if nothing was measured."""
        measured = [value for value in values if value is not None]
        return values.index(self.best(measured)) if measured else None

    def value_text(self, value: float) -> str:
        """The number alone."""
        return f"{value:.1%}" if self.is_share else f"{value:.4g}"

    def titled_value(self, value: float) -> str:
        """The number with the metric's title."""
        return f"{self.title} {self.value_text(value)}"


# The name of a metric that the model itself defines.
SCORE = "score"

ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True, is_share=True)
LOSS = Metric("loss", "loss", higher_is_better=False, is_share=False)

# By name, in order of precedence: the first one that was measured judges the model. A user's own score comes first,
# then what belongs to one task, and loss last, since every task has one.
METRICS = {
    m.name: m
    for m in (
        Metric(SCORE, SCORE, higher_is_better=True, is_share=False),
        Metric("miou", "mean IoU", higher_is_better=True, is_share=True, labels=("classes", "own")),
        Metric("ap", "average precision", higher_is_better=True, is_share=True, labels=("multi", "own")),
        Metric("perplexity", "perplexity", higher_is_better=False, is_share=False, labels=("classes", "own")),
        Metric("rmse", "RMSE", higher_is_better=False, is_share=False, labels=("values", "own")),
        Metric("mae", "MAE", higher_is_better=False, is_share=False, labels=("values", "own")),
        ACCURACY,
        LOSS,
    )
}


def primary_metric(metrics: Mapping[str, float], suffix: str = "") -> tuple[Metric, float] | None:
    """The metric that judges a model, with its value: the first of `METRICS` that is in `metrics` as NAME +
    `suffix`."""
    for name, metric in METRICS.items():
        if (value := metrics.get(name + suffix)) is not None:
            return metric, value
    return None


def served_metric(metrics: Mapping[str, float], kind: str) -> float | None:
    """A metric, such as `accuracy`, of the model that a device serves, on the device's test samples; None if it wasn't
    measured.

    A device serves its average of models if it keeps one, else the model that it trained.
    """
    return metrics.get(f"{kind}_{AVERAGED_SUFFIX}", metrics.get(f"{kind}_{TRAINED_SUFFIX}"))


def served_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Every metric of the model that a device serves, by name."""
    return {name: value for name in METRICS if (value := served_metric(metrics, name)) is not None}


def credible_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are possible measurements: finite, shares from 0 to 1, others within `MAX_LOSS`.

    Densities and the end of training depend on them, so that a device must not steer either with an impossible value.
    """
    credible = {}
    for name, value in metrics.items():
        metric = METRICS.get(name.split("_")[0])
        low, high = (-math.inf, math.inf) if metric is None else metric.limits
        if math.isfinite(value) and low <= value <= high:
            credible[name] = value
    return credible
