"""Measured times of a board's kernels: the time of a training step and of a prediction at any widths.

The time of a graph is the sum over its kernels of calls, parts, MACs, elements moved and weights (which
`fedprune.planning.kernel_workload` counts), each times what the board takes for one of them in a kernel of that kind.
The probe measures small nets at a few widths and fits those numbers; a kind that it saw little of stays near what is
typical.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ProfileError
from fedprune.core.median import median
from fedprune.core.records import convert_record, item_count, number_range
from fedprune.model.architecture import Architecture
from fedprune.planning.costs import ACTIVATION_PASSES, FLOAT, WEIGHT_PASSES
from fedprune.planning.kernel_kinds import FEATURES, KINDS
from fedprune.planning.kernel_workload import BLOCKS, workload

Numbers = npt.NDArray[np.float64]

TYPICAL_TRAINING = {"call": 2e-5, "part": 3e-7, "mac": 6e-11, "move": 1.2e-9, "weight": 4e-9}
# Seconds per unit of any kernel on the machine of `TYPICAL_RATE`; a step has some thirty operators per layer.
TYPICAL_INFERENCE = {"call": 2e-6, "part": 1e-6, "mac": 2e-11, "move": 3e-10, "weight": 1e-10}

# FLOP/s of the probe's training step on that machine: one thread of a server's processor.
TYPICAL_RATE = 50e9

# Seconds that each operator takes on a GPU however small it is: an estimate of onnxruntime's dispatch and a kernel's
# launch on a Jetson.
GPU_LAUNCH = 1e-5

# Share of a GPU's peak rate that products reach in float32: an estimate.
GPU_SHARE = 1 / 3

# FLOP/s and bytes per second of the smallest GPU that trains, a Jetson Orin Nano's.
GPU_PEAK, GPU_BANDWIDTH = 1.31e12, 68e9

# Operators of a training step per row of the cost table: 27 to 32 in the probe's nets of convolutions.
_OPERATORS = 30

# Kinds of which training moves more elements than of others.
_MOVE_FACTORS = {"depthwise": 4.0, "depthwise-small": 4.0, "norm": 3.0, "recurrent": 2.0}

# How strongly a fit holds on to what is typical, where measurements say little.
_PRIOR_WEIGHT = 0.01

# Sweeps of coordinate descent in a fit: enough for tables of this size to settle.
_DESCENT_SWEEPS = 300
_MAX_SECONDS = 1e3
# The least time, whatever a received table says of some kinds: times are divided by one another.
_MIN_SECONDS = 1e-9

UnitSeconds = Annotated[
    tuple[Annotated[float, number_range(0, _MAX_SECONDS)], ...], item_count(len(FEATURES), len(FEATURES))
]
# Seconds per unit (`FEATURES`) by kind of kernel.
UnitSecondsByKind = Mapping[str, UnitSeconds]

_DIGITS = 5
_TRAINING, _INFERENCE = "training", "inference"


@dataclass(frozen=True)
class Measurement:
    """The median time in seconds that one graph took at some widths, for a batch."""

    architecture: Architecture
    widths: tuple[int, ...]
    batch: int
    seconds: float
    training: bool


@dataclass(frozen=True)
class LatencyTable:
    """A board's time for one unit of work, by kind of kernel.

    Attributes:
        block: Channels that its blocked kernels compute at once; 1 if it has none.
        training: Seconds per unit of training steps; `inference` of predictions.
        error: Median relative error over what was measured; NaN where nothing was.
        points: How many graphs and widths were measured.
    """

    block: int
    training: UnitSecondsByKind = field(hash=False)
    inference: UnitSecondsByKind = field(hash=False)
    error: Annotated[float, number_range(0)] = math.nan
    points: Annotated[int, number_range(0, 10**6)] = 0

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ProfileError("latency table: block", expected=f"one of {BLOCKS}", got=repr(self.block)[:80])
        for name in (_TRAINING, _INFERENCE):
            if not any(row[0] > 0 for row in getattr(self, name).values()):
                raise ProfileError(f"latency table: {name}", expected="a time of a call or run", got="none above 0")

    def step_seconds(self, architecture: Architecture, widths: npt.ArrayLike, batch: int) -> Numbers:
        """Times of training steps, [n]; `widths` are [n, groups] or [groups]."""
        return np.maximum(_MIN_SECONDS, workload(architecture).training(widths, batch) @ _vector_of(self.training))

    def latency_seconds(self, architecture: Architecture, widths: npt.ArrayLike, batch: int = 1) -> Numbers:
        """Times of predictions of `batch` samples at once, as `step_seconds` gives them."""
        work = workload(architecture).inference(widths, batch, self.block)
        return np.maximum(_MIN_SECONDS, work @ _vector_of(self.inference))

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {"block": self.block, "points": self.points}
        if math.isfinite(self.error):
            body["error"] = self.error
        for name in (_TRAINING, _INFERENCE):
            body[name] = {kind: list(row) for kind, row in getattr(self, name).items()}
        return body

    @classmethod
    def from_dict(cls, body: object) -> LatencyTable:
        """Read and check; unknown kinds are ignored, missing ones are typical. Raises `ProfileError` if it is not what
        `to_dict` writes."""
        if not isinstance(body, Mapping):
            raise ProfileError("latency table", expected="a table", got=type(body).__name__)
        tables = {}
        for name in (_TRAINING, _INFERENCE):
            if not isinstance(rows := body.get(name), Mapping):
                raise ProfileError(f"latency table: {name}", expected="a table", got=type(rows).__name__)
            typical = getattr(typical_table(), name)
            tables[name] = {kind: rows.get(kind, typical[kind]) for kind in KINDS}
        return convert_record(cls, {**body, **tables}, "latency table", ProfileError)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=64)
def typical_table(rate: float = TYPICAL_RATE) -> LatencyTable:
    """The analytic model for a processor of which only the FLOP/s of the probe's training step are known."""
    slower = TYPICAL_RATE / rate
    training, inference = {}, {}
    for kind in KINDS:
        move_factor = _MOVE_FACTORS.get(kind, 1.0)
        training[kind] = tuple(slower * v * (move_factor if f == "move" else 1.0) for f, v in TYPICAL_TRAINING.items())
        inference[kind] = tuple(slower * v for v in TYPICAL_INFERENCE.values())
    return LatencyTable(16, training, inference)


@lru_cache(maxsize=64)
def typical_gpu_table(peak: float = GPU_PEAK, bandwidth: float = GPU_BANDWIDTH) -> LatencyTable:
    """The analytic model for a GPU: launches, products at a share of its peak FLOP/s, and passes over its memory at
    `bandwidth` bytes per second, one after the other."""
    mac, number = 2 / (GPU_SHARE * peak), FLOAT / bandwidth
    # What one row makes the next one reads, so that each activation is counted twice.
    move, weight = ACTIVATION_PASSES / 2 * number, WEIGHT_PASSES * number
    training = {k: (_OPERATORS * GPU_LAUNCH, 0.0, 3 * mac, _MOVE_FACTORS.get(k, 1.0) * move, weight) for k in KINDS}
    return LatencyTable(1, training, dict.fromkeys(KINDS, (GPU_LAUNCH, 0.0, mac, number, number)))


def fit_latency_table(measured: Sequence[Measurement], typical: LatencyTable | None = None) -> LatencyTable:
    """The table that explains measurements best (least squares of relative errors, no negative times). Kinds that were
    not seen are guessed from the table `typical`, by default `typical_table()`, scaled. Raises `ProfileError` if there
    are no measurements of steps, or none of predictions."""
    steps, predictions = ([m for m in measured if m.training is kind] for kind in (True, False))
    if not steps or not predictions:
        raise ProfileError("latency table: measurements", expected="training steps and predictions")
    typical = typical or typical_table()
    work = np.concatenate([workload(m.architecture).training(m.widths, m.batch) for m in steps])
    training, training_errors = _fit_seconds_per_unit(work, steps, typical.training)
    best: tuple[float, int, Numbers, Numbers] | None = None
    for block in BLOCKS:
        work = np.concatenate([workload(m.architecture).inference(m.widths, m.batch, block) for m in predictions])
        seconds_per_unit, errors = _fit_seconds_per_unit(work, predictions, typical.inference)
        score = float(np.sqrt(np.mean(errors**2)))
        # A smaller block must explain clearly more: without blocked kernels all of them say the same.
        if best is None or score < 0.98 * best[0]:
            best = score, block, seconds_per_unit, errors
    if best is None:
        raise ProfileError("latency table: no block was tried")
    error = median(np.abs(np.concatenate([training_errors, best[3]])))
    return LatencyTable(best[1], _unit_seconds(training), _unit_seconds(best[2]), round(error, 4), len(measured))


def _fit_seconds_per_unit(
    work: Numbers, measured: Sequence[Measurement], typical: UnitSecondsByKind
) -> tuple[Numbers, Numbers]:
    """Seconds per unit, and the relative error of every measurement."""
    seconds = np.array([m.seconds for m in measured])
    prior = _vector_of(typical)
    prior = prior * max(1e-12, median(seconds / (work @ prior)))
    # In multiples of what is typical, so that all unknowns are near 1 and are held there alike.
    scaled = work / seconds[:, None] * prior
    square = scaled.T @ scaled
    used_columns = np.flatnonzero(scaled.any(0))
    target = scaled.sum(0) + _PRIOR_WEIGHT
    square[np.diag_indices_from(square)] += _PRIOR_WEIGHT
    factor = np.ones(len(prior))
    # Coordinate descent: each factor's best value given the others, cut off at 0, since no kernel takes negative time.
    for _ in range(_DESCENT_SWEEPS):
        for j in used_columns:
            factor[j] = max(0.0, factor[j] - (square[j] @ factor - target[j]) / square[j, j])
    return prior * factor, scaled @ factor - 1


def _vector_of(rows: UnitSecondsByKind) -> Numbers:
    return np.array([v for kind in KINDS for v in rows[kind]])


def _unit_seconds(vector: Numbers) -> UnitSecondsByKind:
    table = vector.reshape(len(KINDS), len(FEATURES))
    return {k: tuple(float(f"{v:.{_DIGITS}g}") for v in row) for k, row in zip(KINDS, table.tolist(), strict=True)}
