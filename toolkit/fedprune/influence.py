"""Bounds on how far a single update moves the next model.

The mean of a round's updates has no protection of its own: one board that reports 10^15 samples, or weights at the edge
of the accepted range, decides the result. Two bounds hold by default. Both are measured by the round's own updates, so
that they need no tuning:

- Weight: n_k ← min(n_k, c · median_j n_j).
- Move: per tensor Δ_k ← Δ_k · min(1, limit / ‖Δ_k‖), with ‖Δ_k‖ the root mean square over the elements that the board
  holds and Δ_k the difference to what the board was sent. So a narrow submodel is compared with a wide one.

The limit is a multiple of the round's median, and the median counts as at most twice a *reference*: a slow average
that a job remembers from round to round. It at most doubles or halves in a round, and that of a trained tensor never
exceeds the root mean square of the initial tensor, or 1. So neither a hostile majority of one small round, nor many
rounds in a row, can raise the limit exponentially. In rounds of one or two updates, which have no majority, the
reference alone is the measure. Updates that didn't move at all are not counted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedprune.architecture import Architecture
from fedprune.selection import Tensors
from fedprune.strategies.roles import Report, Submodel

MEMORY = "move_reference"
"""The name of the reference among what a job remembers: per tensor its reference and the most that it can become."""

TENSOR = 2.0
"""A single tensor's limit, in multiples of the whole update's: tensors differ more between boards than updates do."""

REJECTED = 8.0
"""Times its limit that an update is too long for any of it to count: no honest one that we have measured comes near."""

_MAJORITY = 3
"""The fewest updates of which most can be honest while one isn't."""
_GROWTH = 2.0
"""Most times by which the reference changes in a round, and by which a round's median counts as above it."""
_DIGITS = 6
"""Significant digits of a length: sums of squares may differ in the last bits between machines, a model must not."""
_NOTED = 0.5
"""An update of which less than this share counts is reported."""

_NOTED_STATISTICS = 0.1
"""The same of a batch-norm statistic: those of honest boards with unlike data differ much more than weights do."""

WHOLE = ""
"""The key of all trained tensors together."""

Lengths = Mapping[str, float]
"""Root mean square of an update's change by tensor, and under `WHOLE` of all trained tensors together."""


def lengths(report: Report) -> Lengths:
    """How far an update has moved, per tensor.

    Args:
        report: A checked update.
    """
    sent, trained = report.sent.tensors, report.trained
    active = {} if trained.mask is None else trained.mask.active
    found: dict[str, float] = {}
    squares, count = 0.0, 0
    for spec in trained.selection.architecture.tensors:
        now, before = trained.tensors.get(spec.name), sent.get(spec.name)
        if now is None or before is None or now.shape != before.shape or not now.size:
            continue
        moved = now.astype(np.float64).reshape(-1)
        moved -= before.reshape(-1)
        size = moved.size
        if spec.name in active:
            moved *= active[spec.name].reshape(-1)
            size = max(1, int(np.count_nonzero(active[spec.name])))
        square = float(np.dot(moved, moved))
        found[spec.name] = _rounded(math.sqrt(square / size))
        if spec.kind.trainable:
            squares, count = squares + square, count + size
    return found | {WHOLE: _rounded(math.sqrt(squares / max(1, count)))}


@dataclass(frozen=True)
class Bounds:
    """What a round's bounds mean for its updates.

    Attributes:
        rejected: Devices whose whole update is beyond `REJECTED` limits, and why. The rest is worked out without them.
        shares: By device, then by tensor, the share of its change that counts; only tensors with a share below 1.
        reasons: By device, why much less counts than it sent.
        reference: What the job remembers of the round, for `MEMORY`.
    """

    rejected: Mapping[str, str]
    shares: Mapping[str, Mapping[str, float]]
    reasons: Mapping[str, str]
    reference: dict[str, npt.NDArray[np.float64]]


def bounds(
    updates: Mapping[str, Lengths],
    remembered: Mapping[str, npt.NDArray[np.float64]],
    architecture: Architecture,
    model: Tensors,
    times: float,
) -> Bounds:
    """The bounds of a round.

    Args:
        updates: Lengths by device.
        remembered: What the round before left, empty in the first.
        architecture: The model's.
        model: The global model, the initial one where nothing is remembered.
        times: The limit of a whole update, in multiples of the median.
    """
    trained = {t.name for t in architecture.trainable}
    typical, reference = _typical(updates, remembered, trained, model)
    far = REJECTED * times * typical[WHOLE]
    gone = {d: found[WHOLE] for d, found in updates.items() if found[WHOLE] > far} if len(updates) >= _MAJORITY else {}
    if gone:
        rest = {d: found for d, found in updates.items() if d not in gone}
        kept = bounds(rest, remembered, architecture, model, times)
        reasons = {d: f"its update stands out: {_far(length, typical[WHOLE])}" for d, length in gone.items()}
        return replace(kept, rejected=reasons | dict(kept.rejected))
    limits = {n: times * TENSOR * max(v, typical[WHOLE]) for n, v in typical.items()} | {WHOLE: times * typical[WHOLE]}
    shares, reasons = {}, {}
    for device, found in sorted(updates.items()):
        whole = _share(found[WHOLE], limits[WHOLE])
        mine = {n: _share(v, limits[n]) for n, v in found.items() if n != WHOLE}
        mine = {n: min(s, whole) if n in trained else s for n, s in mine.items()}
        least = min(mine, key=lambda n: mine[n], default=WHOLE)
        shares[device] = {n: s for n, s in mine.items() if s < 1}
        if least and mine[least] < (_NOTED if least in trained else _NOTED_STATISTICS):
            name = WHOLE if least in trained and mine[least] == whole else least
            part = f"tensor {name}: " if name else ""
            how = _far(found[name], typical[name])
            reasons[device] = f"its update stands out: {part}{how}; {mine[least]:.2g} of that counted"
    return Bounds({}, shares, reasons, {**remembered, **reference})


def shortened(report: Report, shares: Mapping[str, float]) -> Report:
    """An update of which only a share of each tensor's change counts.

    Args:
        report: The update.
        shares: By tensor; a tensor that is not listed keeps its bits.
    """
    tensors = dict(report.trained.tensors)
    for name in shares.keys() & tensors.keys():
        before = report.sent.tensors[name].astype(np.float64)
        tensors[name] = (before + shares[name] * (tensors[name] - before)).astype(np.float32)
    return replace(report, trained=Submodel(report.trained.selection, tensors, report.trained.mask))


def capped(samples: Mapping[str, int], times: float, most: int = 0, among: Collection[int] = ()) -> dict[str, int]:
    """What devices count for: their samples, up to a multiple of the median.

    Args:
        samples: By device.
        times: The multiple; 0 for no bound.
        most: The most that any counts for; 0 for no bound.
        among: Whose median it is, where that is not the median of `samples`.
    """
    limit = weight_limit(among or samples.values(), times, most)
    return {name: min(count, limit) for name, count in samples.items()}


def weight_limit(samples: Iterable[int], times: float, most: int = 0) -> int:
    """The most samples that a device counts for; arguments as of `capped`."""
    known = sorted(samples)
    limit = most or 2**62
    if times and len(known) >= _MAJORITY:
        limit = min(limit, math.ceil(times * max(1, statistics.median_low(known))))
    return limit


def _typical(
    updates: Mapping[str, Lengths],
    remembered: Mapping[str, npt.NDArray[np.float64]],
    trained: Collection[str],
    model: Tensors,
) -> tuple[dict[str, float], dict[str, npt.NDArray[np.float64]]]:
    """The lengths that a round's updates usually have, and the next reference."""
    typical, reference = {}, {}
    for name in sorted({name for found in updates.values() for name in found} | {WHOLE}):
        before, most = map(float, remembered.get(name, (0.0, _most(name, trained, model))))
        moved = sorted(found[name] for found in updates.values() if found.get(name))  # a board may have nothing new
        middle = statistics.median_low(moved) if moved else before
        after = min(max(middle, before / _GROWTH), before * _GROWTH) if before else middle
        reference[name] = np.array([min(after, most), most])
        if len(moved) >= _MAJORITY:
            usual = min(middle, _GROWTH * before) if before else middle
        else:
            usual = before or max(moved, default=0.0)
        typical[name] = min(usual, most)
    return typical, reference


def _far(length: float, usual: float) -> str:
    over = length / usual if usual > 0 else math.inf
    return f"it moved {over:.3g} times as far as the round's updates usually do"


def _most(name: str, trained: Collection[str], model: Tensors) -> float:
    """What a reference never exceeds: statistics follow the data's scale, of which the model knows nothing."""
    if name == WHOLE:
        return max(1.0, *(_most(n, trained, model) for n in trained)) if trained else math.inf
    if name not in trained or not model[name].size:
        return math.inf if name not in trained else 1.0
    flat = model[name].astype(np.float64).reshape(-1)
    return max(1.0, _rounded(math.sqrt(float(np.dot(flat, flat)) / flat.size)))


def _share(length: float, limit: float) -> float:
    return 1.0 if length <= limit else limit / length


def _rounded(length: float) -> float:
    return float(f"{length:.{_DIGITS}g}")
