"""Finished rounds as rows of numbers: for experiment trackers, and for the records and tables of simulations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination.job_end import EPSILON_NEXT
from fedprune.core.metrics import METRICS, TRAINED_SUFFIX, served_metric
from fedprune_device.training.round_runner import MACHINE_METRICS
from fedprune_server.executor.accountant import EPSILON

# The privacy cost of a private job: coordinators record it among a round's measurements, and it is none of the model's.
PRIVACY_METRICS = (EPSILON, EPSILON_NEXT)


@dataclass
class RoundNotes:
    """Notes of a round.

    Attributes:
        down: Bytes sent to devices since the start.
        up: Bytes sent by devices since the start.
        spent: Bytes down, bytes up, training MACs and those of active weights of each device since the previous
            round.
        measured: Measurements of the global model.
        updates: Number of aggregated updates.
        limited: Number of those that counted for less than they were, by the job's limits.
        coverage: Number of updates that held each channel, per group; empty if not recorded.
    """

    down: int = 0
    up: int = 0
    spent: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    limited: int = 0
    coverage: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class RoundRow:
    """One finished round.

    Attributes:
        round: Its number, from 1.
        elapsed_s: Its end, in seconds since the run's start.
        model: Digest of the global model.
        metrics: Measurements of the global model on the server's data, such as accuracy and loss.
        local: Score of each delivering device's served model on its own test data, by the run's metric.
        asked: Number of devices that were asked to train.
        down: Bytes from server to devices since the start.
        up: Bytes from devices to server since the start.
        device_metrics: Other measurements of delivering devices, per metric and device.
        density: Share of the model of each delivering device.
        measured: A simulation's measurements of the global model, by name; of a private job also its `epsilon` and
            `epsilon_next`.
        spent: Bytes down, bytes up, training MACs and, of these, the MACs of active weights of each device since the
            previous round; in simulations.
        updates: Number of aggregated updates; in simulations.
        limited: Number of those that counted for less than they were, by the job's limits; in simulations.
        coverage: Number of updates that held each channel, per group; empty if not recorded.
    """

    round: int
    elapsed_s: float
    model: str
    metrics: dict[str, float]
    local: dict[str, float]
    asked: int
    down: int
    up: int
    device_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    density: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    spent: dict[str, list[int]] = field(default_factory=dict)
    updates: int = 0
    limited: int = 0
    coverage: list[list[int]] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """The global model's accuracy on the server's data."""
        return self.metrics.get("accuracy")

    @property
    def loss(self) -> float | None:
        """The global model's loss on the server's data."""
        return self.metrics.get("loss")

    @property
    def macs(self) -> int:
        """Training MACs since the previous round."""
        return sum(spent[2] for spent in self.spent.values())

    @property
    def active_macs(self) -> int:
        """Training MACs whose weight an element mask leaves active, since the previous round."""
        return sum(spent[3] for spent in self.spent.values())


def make_round_row(entry: Mapping[str, Any], notes: RoundNotes, started_at: float, judge: str) -> RoundRow:
    """The row of a finished round.

    Args:
        entry: The round in a job's history.
        started_at: The run's start, on the clock of the history.
        judge: The metric by which models are judged.
    """
    metrics, devices = entry["metrics"], entry["devices"]
    delivered_parts = {n: device_part for n, device_part in devices.items() if device_part["progress"] == "folded"}
    measurements = {n: device_part["metrics"] for n, device_part in delivered_parts.items()}
    served_scores = {n: served_metric(values, judge) for n, values in measurements.items()}
    names = sorted(set().union(*measurements.values()) - MACHINE_METRICS)
    return RoundRow(
        round=entry["round"],
        elapsed_s=entry["at"] - started_at,
        model=entry["model"],
        metrics={n: metrics[n] for n in METRICS if n in metrics},
        local={n: value for n, value in served_scores.items() if value is not None},
        asked=len(devices),
        down=notes.down,
        up=notes.up,
        device_metrics={m: {n: v[m] for n, v in measurements.items() if m in v} for m in names},
        density={n: device_part["density"] for n, device_part in delivered_parts.items() if "density" in device_part},
        measured={k: metrics[k] for k in PRIVACY_METRICS if k in metrics} | notes.measured,
        spent={n: list(v) for n, v in sorted(notes.spent.items())},
        updates=notes.updates,
        limited=notes.limited,
        coverage=notes.coverage,
    )


@dataclass(frozen=True)
class RoundScores:
    """A round's scores by one metric; NaN where nothing was measured.

    Attributes:
        global_model: The new global model's, on the server's samples.
        received: Mean over delivering boards of the scores of the models that they received, each on the board's own
            test samples.
        trained: The same of the models that they made of these by training.
    """

    global_model: float
    received: float
    trained: float


def round_scores(entry: Mapping[str, Any], metric: str) -> RoundScores:
    """The scores of a round in a job's history, by the metric of this name."""
    folded = [
        device_part.get("metrics", {})
        for device_part in entry["devices"].values()
        if device_part["progress"] == "folded"
    ]
    before, after = f"{metric}_before", f"{metric}_{TRAINED_SUFFIX}"
    # Means over the same boards, so that their difference is what training changed.
    pairs = [(m[before], m[after]) for m in folded if before in m and after in m] or [(math.nan, math.nan)]
    received, trained = (math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True))
    return RoundScores(entry["metrics"].get(metric, math.nan), received, trained)


# Columns that every round has, in the order of the table; measurements follow, which differ between jobs.
COMMON_COLUMNS = (
    "round", "time_s", "total_bytes_down", "total_bytes_up", "training_macs", "active_macs", "asked", "updates",
    "limited", "model",
)  # fmt: skip


class WideRows:
    """Makes the wide table's rows, one round after the other.

    Means are over each device's latest value: over the devices of a round alone they would jump with the draw.

    Args:
        judge: The metric by which models are judged, such as `accuracy`.
    """

    def __init__(self, judge: str) -> None:
        self._judge = judge
        self._latest: dict[str, dict[str, float]] = {}

    def row(self, r: RoundRow) -> dict[str, Any]:
        self._update_latest(f"local_{self._judge}", r.local)
        for metric, values in r.device_metrics.items():
            self._update_latest(f"mean_{metric}", values)
        columns = (r.round, r.elapsed_s, r.down, r.up, r.macs, r.active_macs, r.asked, r.updates, r.limited, r.model)
        means = {name: sum(latest.values()) / len(latest) for name, latest in self._latest.items() if latest}
        return dict(zip(COMMON_COLUMNS, columns, strict=True)) | r.metrics | means | r.measured

    def _update_latest(self, name: str, values: Mapping[str, float]) -> None:
        self._latest.setdefault(name, {}).update(values)
