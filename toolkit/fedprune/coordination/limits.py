"""Limits on how far a single update moves the next model.

The mean of a round's updates has no protection of its own: one board that reports 10^15 samples, or weights at the edge
of the accepted range, decides the result. Limits are multiples of the round's own medians, so that they need no tuning;
nothing that a board says of itself, its steps for example, lets it count for more.

| what | bound | why |
|---|---|---|
| weight n_k | c · median_j n_j, by default c = 1 | half of a round's boards count for as much as any one |
| length of an update | m · usual length, or it is shortened | an honest board may have more to learn than others |
| length of a tensor | 2m · usual length, or it is shortened | tensors differ more between boards than updates do |
| length of an update | 8m · median, or it is rejected | by the median, fewer than half can be rejected |
| usual length | the median; 1 to 2 references | most boards soon move less, those with unlike data later |
| reference, in a round | up to twice, down by 2^(1/20) | hostile rounds can't raise the limit without bound |
| reference | 1/1024 to 1 of the tensor's scale | boards count in full ten rounds after quiet ones |
| statistics' reference | no upper end, halves in a round | they are measured anew, and follow the data's scale |
| one or two updates | multiples of the reference alone | they have no majority |

m is the job's `move_limit`. A length is ‖Δ_k‖, the root of a change's sum of squares divided by the elements of the
whole model's tensor: how far the update alone would move the model, whatever the board's width, without elements that a
mask leaves out. A scale is the root mean square of the initial tensor, but at least 1. The job keeps references from
round to round, and renews them from all valid updates; those without any change are left out of medians.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors
from fedprune.strategies.values import Memories, Report, Scene, Submodel

MEMORY = "move_reference"
"""Key of the references in a job's memory: per tensor its reference and its scale."""

TENSOR_FACTOR = 2.0
"""Limit of a single tensor, as a multiple of `move_limit`: tensors differ more between boards than updates do."""

REJECT_FACTOR = 8.0
"""An update longer than this many limits is rejected. None of the honest updates that we measured was."""

_MAJORITY = 3
"""Fewest updates that have an honest majority if one of them is hostile."""
_GROWTH = 2.0
"""Largest factor by which a reference grows in a round, and by which a round's median counts as longer than it."""
_FALL = 2.0 ** (1 / 20)
"""Largest factor by which a trained tensor's reference falls in a round; for batch-norm statistics it is `_GROWTH`."""
_LEAST = 2.0**-10
"""Lower end of a reference, as a multiple of its tensor's scale."""
_BLOCK = 2**15
"""Numbers of a tensor that are squared at once."""
_DIGITS = 6
"""Significant digits of a length: the last bits of a sum of squares differ between machines, and models must not."""
_NOTED = 0.25
"""An update is reported if less than this share of it counts. An honest board with many samples takes more steps, and
moves a few times as far as others."""

_NOTED_STATISTICS = 0.1
"""The same for a batch-norm statistic: between honest boards with unlike data, statistics differ more than weights."""

WHOLE = ""
"""Key of all trained tensors together."""

Lengths = Mapping[str, float]
"""Root mean square of an update's change: by tensor of the whole model, and under `WHOLE` over all trained tensors.
Elements of channels that the board doesn't hold count as unchanged; a mask's inactive ones are left out of the mean."""


def lengths(report: Report) -> Lengths:
    sent, trained = report.sent.tensors, report.trained
    found: dict[str, float] = {}
    squares, count = 0.0, 0.0
    for spec in trained.selection.architecture.tensors:
        size, square = float(math.prod(spec.shape)), 0.0
        now, before = trained.tensors.get(spec.name), sent.get(spec.name)
        if now is not None and before is not None and now.shape == before.shape and now.size:
            mask = trained.mask.get(spec.name)
            if mask is not None:
                size *= max(1, int(np.count_nonzero(mask))) / now.size
            square = _squared(now.reshape(-1), before.reshape(-1), None if mask is None else mask.reshape(-1))
            found[spec.name] = _rounded(math.sqrt(square / size))
        if spec.kind.trainable:
            squares, count = squares + square, count + size
    return found | {WHOLE: _rounded(math.sqrt(squares / max(1.0, count)))}


def _squared(
    now: npt.NDArray[np.float32], before: npt.NDArray[np.float32], active: npt.NDArray[np.bool_] | None
) -> float:
    """Sum of squares of a change, block by block in the cache."""
    square = 0.0
    for start in range(0, now.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        moved = np.subtract(now[part], before[part], dtype=np.float64)
        if active is not None:
            moved *= active[part]
        square += float(np.dot(moved, moved))
    return square


@dataclass(frozen=True)
class Bounds:
    """The limits of a round, applied to its updates.

    Attributes:
        rejected: Reasons by device whose update is rejected.
        shares: By other device, then by tensor, the share of its change that counts; only tensors with a share below 1.
        reasons: By device, why much less counts than it sent.
        reference: The renewed references, for `MEMORY`.
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
    """Apply the limits to a round.

    Args:
        updates: Lengths by device.
        remembered: References of the round before, empty in the first.
        model: The global model; in the first round the initial one, from which the scales are taken.
        times: Limit of a whole update, as a multiple of the median.
    """
    trained = {t.name for t in architecture.trainable}
    scaled = trained | {WHOLE}
    rejected = _rejected(updates, times, float(remembered[WHOLE][0]) if WHOLE in remembered else 0.0)
    kept = {device: found for device, found in updates.items() if device not in rejected}
    typical, reference = {}, {}
    for name in sorted({name for found in updates.values() for name in found} | {WHOLE}):
        before, scale = map(float, remembered.get(name, (0.0, _scale(name, trained, model))))
        most, fall, floor = (scale, _FALL, before) if name in scaled else (math.inf, _GROWTH, 0.0)
        moved = _moved(name, updates)
        reference[name] = np.array([_renewed(before, moved, scale * _LEAST, most, fall), scale])
        usual = _typical(before, _moved(name, kept), majority=len(moved) >= _MAJORITY)
        typical[name] = min(max(usual, floor), most)
    limits = {n: times * TENSOR_FACTOR * max(v, typical[WHOLE]) for n, v in typical.items()} | {
        WHOLE: times * typical[WHOLE]
    }
    shares, reasons = {}, {}
    for device, found in sorted(kept.items()):
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
    return Bounds(rejected, shares, reasons, {**remembered, **reference})


def shortened(report: Report, shares: Mapping[str, float]) -> Report:
    """An update with only a share of each tensor's change; tensors without a share stay bit for bit the same."""
    tensors = dict(report.trained.tensors)
    for name in shares.keys() & tensors.keys():
        before = report.sent.tensors[name].astype(np.float64)
        tensors[name] = (before + shares[name] * (tensors[name] - before)).astype(np.float32)
    return replace(report, trained=Submodel(report.trained.selection, tensors, report.trained.mask))


def capped(samples: Mapping[str, int], times: float, most: int = 0) -> dict[str, int]:
    """Weights of devices: their samples, up to `times` the median and up to `most` (0 for no limit)."""
    limit = weight_limit(samples.values(), times, most)
    return {name: min(count, limit) for name, count in samples.items()}


def weight_limit(samples: Iterable[int], times: float, most: int = 0) -> int:
    """Largest weight of a device; arguments as for `capped`."""
    return limit_of(Counter(samples), times, most)


def limit_of(counts: Mapping[int, int], times: float, most: int = 0) -> int:
    """The same by how many devices have each number of samples."""
    limit, known = most or 2**62, sum(counts.values())
    if times and known >= _MAJORITY:
        ordered = sorted(counts)
        below = accumulate(counts[n] for n in ordered)
        median = next(n for n, end in zip(ordered, below, strict=True) if 2 * end >= known)
        limit = min(limit, math.ceil(times * max(1, median)))
    return limit


def _rejected(updates: Mapping[str, Lengths], times: float, reference: float) -> dict[str, str]:
    """Reasons by device whose update is too long to count; fewer than half of the updates, as the median is one."""
    moved = _moved(WHOLE, updates)
    if len(moved) < _MAJORITY:
        return {}
    middle = max(statistics.median_high(moved), reference)
    far = {device: found[WHOLE] for device, found in updates.items() if found[WHOLE] > REJECT_FACTOR * times * middle}
    return {device: f"its update stands out: {_far(length, middle)}" for device, length in far.items()}


def _moved(name: str, updates: Mapping[str, Lengths]) -> list[float]:
    """Lengths of a tensor's changes, sorted, without those that are 0."""
    return sorted(found[name] for found in updates.values() if found.get(name))


def _typical(before: float, moved: Sequence[float], *, majority: bool) -> float:
    """The length of which limits are multiples."""
    if not moved:
        return before
    if not majority:
        return before or moved[-1]
    middle = statistics.median_low(moved)
    return min(middle, _GROWTH * before) if before else middle


def _renewed(before: float, moved: Sequence[float], least: float, most: float, fall: float) -> float:
    """The next reference; 0 as long as no update has changed the tensor."""
    if not moved:
        return before
    low, high = (statistics.median_low(moved),) * 2 if len(moved) >= _MAJORITY else (moved[0], moved[-1])
    after = min(max(before or low, low), high)
    if before:
        after = min(max(after, before / fall), before * _GROWTH)
    return min(max(after, least), most)


def _far(length: float, usual: float) -> str:
    over = length / usual if usual > 0 else math.inf
    return f"it moved {over:.3g} times as far as is usual"


def _scale(name: str, trained: Collection[str], model: Tensors) -> float:
    if name == WHOLE:
        return max((_scale(n, trained, model) for n in trained), default=1.0)
    flat = model[name].astype(np.float64).reshape(-1)
    return max(1.0, _rounded(math.sqrt(float(np.dot(flat, flat)) / max(1, flat.size))))


def _share(length: float, limit: float) -> float:
    return 1.0 if length <= limit else limit / length


def _rounded(length: float) -> float:
    return float(f"{length:.{_DIGITS}g}")


@dataclass(frozen=True)
class RoundUpdate:
    """One update of a round, and how it is read.

    Attributes:
        device: The client's name.
        key: Identifies the content: updates of equal keys are equal bit for bit.
        weight: What it counts for.
        samples: Training samples that the client reports.
        read: Reads and decodes it; all is checked that doesn't depend on the round's sums.
        shares: By tensor the share of its change that counts, where that is less than all of it.
        checked: It is in memory and has passed `Round.check`; it isn't checked again.
    """

    device: str
    key: Hashable
    weight: int
    samples: int
    read: Callable[[], Report] = field(compare=False)
    shares: Mapping[str, float] = field(default_factory=dict)
    checked: bool = field(default=False, compare=False)

    def report(self) -> Report:
        """Read it, as far as it counts."""
        report = replace(self.read(), weight=self.weight)
        return shortened(report, self.shares) if self.shares else report


_LOG = logging.getLogger(__name__)

_REPORTED = 8
"""A device is named that reports more samples than this multiple of its limit: honest boards have a few times the
median."""


@dataclass(frozen=True)
class LimitedUpdates:
    """A round's updates with the shares of their change that count, reasons of what doesn't, what the job remembers
    of it, and the devices whose update counts for less than it is, by however little, or whose samples count for much
    less."""

    updates: tuple[RoundUpdate, ...]
    rejected: Mapping[str, str]
    reasons: Mapping[str, str]
    memories: Memories
    reduced: frozenset[str] = frozenset()


class UpdateLimits:
    """Keeps how far updates moved, so that none is read twice for its limits; `uniform` where devices count alike."""

    def __init__(self, job: Job, *, uniform: bool) -> None:
        self._job = job
        self._uniform = uniform
        # The noise that boards share out is accounted for sums in which updates don't depend on one another.
        self._times = 0.0 if job.privacy.on and not job.privacy.local else job.move_limit
        self._lengths: dict[Hashable, Lengths] = {}

    def learn(self, update: RoundUpdate, known: Report | Lengths) -> None:
        """Note how far an update moved, from its checked report or from its lengths."""
        if self._times and update.key not in self._lengths:
            self._lengths[update.key] = lengths(known) if isinstance(known, Report) else known

    def apply(self, scene: Scene, updates: Sequence[RoundUpdate]) -> LimitedUpdates:
        """Apply the limits to all updates of a round; those that can't be read are left as they are."""
        heavy, reasons = self._heavy(updates)
        if not self._times or not updates:
            return LimitedUpdates(tuple(updates), {}, reasons, {}, heavy)
        for update in updates:
            if update.key not in self._lengths:
                try:
                    self.learn(update, update.read())
                except (StorageError, MemoryError):
                    raise
                except Exception:  # noqa: BLE001 - it fails again where it is read to be added, with its reason
                    _LOG.debug("length of the update of %s", update.device, exc_info=True)
        self._lengths = {u.key: self._lengths[u.key] for u in updates if u.key in self._lengths}
        known = [u for u in updates if u.key in self._lengths]
        found = bounds(
            {u.device: self._lengths[u.key] for u in known},
            scene.memory.get(MEMORY, {}),
            scene.architecture,
            scene.model,
            self._times,
        )
        left = [u for u in updates if u.device not in found.rejected]
        limited = tuple(replace(u, shares=found.shares.get(u.device, {})) for u in left)
        reduced = heavy.union(u.device for u in limited if u.shares) - found.rejected.keys()
        reasons = {**reasons, **found.reasons}
        return LimitedUpdates(limited, found.rejected, reasons, {MEMORY: found.reference}, reduced)

    def _heavy(self, updates: Sequence[RoundUpdate]) -> tuple[frozenset[str], dict[str, str]]:
        """Devices that count for much less than the samples that they report, and why."""
        if self._uniform:
            return frozenset(), {}
        samples = {u.device: u.samples for u in updates}
        limit = weight_limit(samples.values(), self._job.weight_limit, self._job.most_samples)
        reasons = {
            device: f"it reports {count} samples and counts for {limit}, the most that one device may"
            for device, count in samples.items()
            if count > math.ceil(_REPORTED * limit)
        }
        return frozenset(reasons), reasons
