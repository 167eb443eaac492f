"""Finished rounds as rows of numbers: for experiment trackers, and for the records and tables of simulations.

entry of a job's history, RoundNotes  --make_round_row-->  RoundRow  --WideRows.row-->  columns of a table
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination.job_end import EPSILON_NEXT
from fedprune.core.metrics import METRICS, TRAINED_SUFFIX, served_metric
from fedprune_device.training.evaluation import MACHINE_METRICS
from fedprune_server.executor.accountant import EPSILON

# The privacy cost of a private job: coordinators record it among a round's measurements, but it doesn't rate the model.
PRIVACY_METRICS = (EPSILON, EPSILON_NEXT)

# Places in the list of a device's costs (`RoundNotes.spent`): bytes down, bytes up, training MACs, and these below.
_MACS, _ACTIVE_MACS, _MICROJOULES = 2, 3, 4


@dataclass
class RoundNotes:
    """What a job's history doesn't have of a round; a server notes only the bytes, a simulation all.

    Attributes:
        down: Bytes sent to devices since the start.
        up: Bytes sent by devices since the start.
        spent: Costs of each device since the previous round: bytes down, bytes up, training MACs; of these, the
            MACs whose weight an element mask leaves active; and µJ of training, 0 if the board's power is unknown.
        measured: A simulation's measurements of the global model, by name.
        updates: Number of aggregated updates.
        limited: Number of updates that the job's limits reduced.
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
    """One finished round: its entry in the job's history, and the fields of its `RoundNotes`.

    Attributes:
        round: Its number, from 1.
        elapsed_s: Its end, in seconds since the run's start.
        model: Digest of the global model.
        metrics: Measurements of the global model on the server's data, such as accuracy and loss.
        local: Score of each delivering device's served model on its own test data, by the run's metric.
        asked: Number of devices that were asked to train.
        device_metrics: Other measurements of delivering devices, per metric and device.
        density: Share of the model of each delivering device.
        measured: As in the notes; for a private job also its `epsilon` and `epsilon_next`.
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
    def macs(self) -> int:
        """Training MACs since the previous round."""
        return sum(costs[_MACS] for costs in self.spent.values())

    @property
    def active_macs(self) -> int:
        """Training MACs whose weight an element mask leaves active, since the previous round."""
        return sum(costs[_ACTIVE_MACS] for costs in self.spent.values())

    @property
    def joules(self) -> float:
        """Energy of training since the previous round, beyond what idle boards take; NaN if a board's is unknown."""
        trained = [costs[_MICROJOULES] for costs in self.spent.values() if costs[_MACS]]
        return sum(trained) / 1e6 if all(trained) else math.nan


def make_round_row(entry: Mapping[str, Any], notes: RoundNotes, started_at: float, judge: str) -> RoundRow:
    """The row of a finished round, given its entry in the job's history.

    `started_at` is the run's start by the clock of the history, `judge` the metric by which models are judged.
    """
    metrics, devices = entry["metrics"], entry["devices"]
    # "folded": added to the round's sum of updates.
    delivered = {n: device for n, device in devices.items() if device["progress"] == "folded"}
    measurements = {n: device["metrics"] for n, device in delivered.items()}
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
        density={n: device["density"] for n, device in delivered.items() if "density" in device},
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
        global_model: The new global model's score on the server's samples.
        received: The mean score of the models that boards received, each on its board's own test samples.
        trained: The mean score of the models that the same boards made of these by training.
    """

    global_model: float
    received: float
    trained: float


def round_scores(entry: Mapping[str, Any], metric: str) -> RoundScores:
    """The scores of a round in a job's history, by the metric of this name."""
    # "folded": added to the round's sum of updates.
    folded = [device.get("metrics", {}) for device in entry["devices"].values() if device["progress"] == "folded"]
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
    """Makes a table with one row per round and one column per measurement; call `row` for each round, in order.

    `judge` is the metric by which models are judged, such as `accuracy`. Means are over each device's latest value:
    means over only the devices of a round would jump with the draw.
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
        if served := self._latest[f"local_{self._judge}"]:
            means["local_devices"] = len(served)
        return dict(zip(COMMON_COLUMNS, columns, strict=True)) | r.metrics | means | r.measured

    def _update_latest(self, name: str, values: Mapping[str, float]) -> None:
        self._latest.setdefault(name, {}).update(values)
