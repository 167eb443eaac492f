"""A run's record: its numbers after the end, for reports and comparisons.

The daemon's history and the simulator's have the same format; `metrics.json` is a record on disk.
"""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from fedprune.core import records
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.metrics import AVERAGED_SUFFIX, METRICS, TRAINED_SUFFIX, Metric
from fedprune.core.text import quantity
from fedprune.model.recipe import judged_by
from fedprune_server.devices.plan_vs_actual import RoundComparison
from fedprune_server.executor.accountant import EPSILON
from fedprune_server.monitoring.round_rows import PRIVACY_METRICS, RoundRow
from fedprune_server.simulation.datasets.fleet_data import FleetData

ALONE = "local"  # the strategy with which every board trains alone

_RECIPE_FACTS = {"learning rate": "lr", "batch size": "batch_size"}


@dataclass(frozen=True)
class DeviceRow:
    """One device of the fleet.

    Attributes:
        profile: Its profile's name.
        widths: Kept channels per group.
        density: Planned share of the model; 1 for the whole model.
        bound: The limit that binds its width; empty without a plan.
        excluded: Reason of its exclusion; empty if it takes part.
        compared: Predicted and measured values per metric, see `devices.plan_vs_actual`.
        missed: Rounds in which it was asked and delivered nothing that counts.
        why: Reason in the last of them.
        kind: The `FailureKind` of that.
        unit: What it trains on, `GPU` or `CPU`; empty if unknown.
        train_j: Predicted energy of a round's training, in joules; None if unknown.
        warning: That of its plan.
        asked: The share of the model that its plan was asked for; 0 where the planner chose, or without a plan.
    """

    name: str
    profile: str
    samples: int
    widths: tuple[int, ...]
    density: float
    bound: str
    parameters: int
    excluded: str = ""
    compared: RoundComparison = field(default_factory=dict)
    missed: int = 0
    why: str = ""
    kind: str = ""
    unit: str = ""
    train_j: float | None = None
    warning: str = ""
    asked: float = 0.0


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        groups: Producing layer and size of each channel group.
        channels: Channels that each device held in the last round, per group, most important first.
        measured: Where bytes were counted, such as "payload at the broker".
        partition: The fleet's data, if known.
        version: fedprune's version.
        uncalibrated: Whether the global model's batch-norm statistics are averages of the boards'.
        ended_early: Why the job, which is finished, has fewer rounds than it may have; empty if it has all of them.
    """

    title: str
    job: dict[str, Any]
    groups: tuple[tuple[str, int], ...]
    devices: tuple[DeviceRow, ...]
    rounds: tuple[RoundRow, ...]
    channels: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    measured: str = ""
    partition: FleetData = field(default_factory=FleetData)
    version: str = ""
    uncalibrated: bool = False
    ended_early: str = ""
    format: Literal["fedprune.record/1"] = "fedprune.record/1"

    def facts(self) -> dict[str, str]:
        """A report's header: strategy, data, recipe, seed, version, date; empty where unknown."""
        job, recipe = self.job, self.job.get("recipe", {})
        length = f"{recipe['steps']} steps" if recipe.get("steps") else quantity(recipe.get("epochs", 0), "epoch")
        settings_of = [
            str(recipe.get("optimizer", "")),
            *(f"{k} {recipe[n]:g}" for k, n in _RECIPE_FACTS.items() if n in recipe),
        ]
        return {
            "Strategy": str(job.get("strategy", "")),
            "Data": self.partition.summary,
            "Recipe": ", ".join([*settings_of, length]) if recipe else "",
            "Devices": f"{len(self.devices):,}",
            "Rounds": f"{len(self.rounds):,}",
            "Seed": str(self.seed),
            "fedprune": self.version,
            "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }

    @property
    def last(self) -> RoundRow:
        """The last round. Raises `StorageError` if no round has ended."""
        if not self.rounds:
            raise StorageError(f"run {self.title!r} has no finished round")
        return self.rounds[-1]

    @property
    def seed(self) -> int:
        return int(self.job.get("seed", 0))

    @property
    def measure(self) -> str:
        """The name in `METRICS` of the metric by which models are judged."""
        return judged_by(self.job.get("recipe", {}))

    @property
    def metric(self) -> Metric:
        return METRICS[self.measure]

    @property
    def is_alone(self) -> bool:
        """Whether each board trains alone."""
        return self.job.get("strategy") == ALONE

    def global_values(self) -> tuple[float | None, ...]:
        """The global model's measure per round; None without data of the server, or if each board trains alone."""
        return tuple(None if self.is_alone else r.metrics.get(self.measure) for r in self.rounds)

    @property
    def best(self) -> RoundRow | None:
        """The round whose global model scored best, the earliest of equals; None without data of the server."""
        best = self.metric.best_index(self.global_values())
        return None if best is None else self.rounds[best]

    def own_means(self, metric: str) -> tuple[float | None, ...]:
        """Mean over devices of their latest value of a metric, per round; None before the first."""
        return _running(_mean, (row.device_metrics.get(metric, {}) for row in self.rounds))

    def measured_values(self, name: str) -> tuple[float | None, ...]:
        """A measurement of the global model per round; None where missing."""
        return tuple(r.measured.get(name) for r in self.rounds)

    @property
    def is_private(self) -> bool:
        return bool(self.job.get("privacy"))

    @property
    def epsilon(self) -> float | None:
        """The highest ε of any device after the last round; None where it wasn't counted."""
        return self.last.measured.get(EPSILON)

    @property
    def count_limited(self) -> tuple[int, int]:
        """The number of updates that the job's limits reduced, and of all updates."""
        return sum(row.limited for row in self.rounds), sum(row.updates for row in self.rounds)

    def macs(self) -> int:
        return sum(r.macs for r in self.rounds)

    def first_round_reaching(self, target: float) -> RoundRow | None:
        """The first round whose global model reaches a target, or None."""
        for row, value in zip(self.rounds, self.global_values(), strict=True):
            if value is not None and (value >= target if self.metric.higher_is_better else value <= target):
                return row
        return None

    def mean_locals(self) -> tuple[float | None, ...]:
        """Mean over devices of their latest measure, per round; None before the first.

        Rounds ask different devices, so a mean over those of one round would compare different fleets.
        """
        return _running(_mean, (row.local for row in self.rounds))

    def worst_locals(self) -> tuple[float | None, ...]:
        """The worst of the devices' latest measures, per round; None before the first."""
        return _running(self.metric.worst, (row.local for row in self.rounds))

    def local_deviations(self) -> tuple[float | None, ...]:
        """Standard deviation over devices of their latest measure, per round; None before the first."""
        return _running(statistics.pstdev, (row.local for row in self.rounds))

    @property
    def latest(self) -> dict[str, float]:
        """The latest measure of each device that ever delivered."""
        return deque(latest_values([{}, *(row.local for row in self.rounds)]), maxlen=1)[0]

    @property
    def delivered(self) -> set[str]:
        """Devices of which an update counted."""
        return set().union(*(row.density.keys() | row.local.keys() for row in self.rounds))

    def final(self, rounds: int = 1) -> tuple[float, float]:
        """Mean local and global measure over the last `rounds` rounds; NaN without measurements."""
        local_mean, global_mean = (last_mean(v, rounds) for v in (self.mean_locals(), self.global_values()))
        return math.nan if local_mean is None else local_mean, math.nan if global_mean is None else global_mean

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "record") -> Record:
        """Read the output of `to_json`. Raises `StorageError` if it is damaged or of another format."""
        return records.decode_record(cls, text.encode(errors="surrogatepass"), source, StorageError)

    def save(self, path: Path) -> None:
        """Write the record to a file. Raises `StorageError` if the disk fails; an older file is untouched."""
        write_atomically(path, (self.to_json() + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record's file. Raises `StorageError` if it can't be read or is damaged; the message names it."""
        with storage_errors(f"can't read {path}"):
            raw = read_file(path)
        try:
            return cls.from_json(raw.decode(), str(path))
        except UnicodeDecodeError:
            hint = "Give the folder of a run, or its metrics.json."
            raise StorageError(f"{path} is no run's record", expected="JSON", got="no text", hint=hint) from None


def measured_moments(runs: Sequence[Record]) -> tuple[str, ...]:
    """The models that boards measure besides the one that they serve: as received, and as trained if averages serve."""
    kind, metric_names = runs[0].measure, {name for run in runs for row in run.rounds for name in row.device_metrics}
    pairs = (("before", "before"), (TRAINED_SUFFIX, AVERAGED_SUFFIX))
    return tuple(moment for moment, sign in pairs if f"{kind}_{sign}" in metric_names)


def measured_names(runs: Sequence[Record]) -> list[str]:
    """Names of the runs' measurements of the global model that are of the leading metric's kind."""
    wants_loss = runs[0].measure == "loss"
    names = dict.fromkeys(name for run in runs for row in run.rounds for name in row.measured)
    return [name for name in names if name not in PRIVACY_METRICS and name.endswith("_loss") == wants_loss]


def score_text(value: float | None, metric: Metric) -> str:
    """A share as a percentage, any other metric as a number."""
    return "–" if value is None or not math.isfinite(value) else metric.value_text(value)


def last_mean(values: Sequence[float | None], rounds: int) -> float | None:
    """The mean of the values of the last rounds; None if nothing was measured in them."""
    measured_values = [v for v in values[-rounds:] if v is not None]
    return _mean(measured_values) if measured_values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def latest_values(rows: Iterable[Mapping[str, float]]) -> Iterator[dict[str, float]]:
    """The devices' latest values, per round."""
    # A device that isn't asked keeps its last value, so that statistics don't jump with who is asked.
    return accumulate(map(dict, rows), operator.or_)


def _running(
    statistic: Callable[[Sequence[float]], float], rows: Iterable[Mapping[str, float]]
) -> tuple[float | None, ...]:
    """A statistic of the devices' latest values, per round."""
    return tuple(statistic([*latest.values()]) if latest else None for latest in latest_values(rows))
