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
from fedprune.strategies.values import Memories, Scene, Submodel, UpdateReport

# Key of the references in a job's memory: per tensor its reference and its scale. They outlive a round, since a single
# round's median is whatever its boards say.
REFERENCES_MEMORY = "move_reference"

# Limit of a single tensor, as a multiple of `move_limit`: tensors differ more between boards than updates do.
TENSOR_FACTOR = 2.0

# An update longer than this many limits is rejected. None of the honest updates that we measured was.
REJECT_FACTOR = 8.0

# Fewest updates that have an honest majority if one of them is hostile.
_MIN_MAJORITY_UPDATES = 3
# Largest factor by which a reference grows in a round, and by which a round's median counts as longer than it.
_MAX_GROWTH = 2.0
# Largest factor by which a trained tensor's reference falls in a round; for batch-norm statistics it is `_MAX_GROWTH`.
_MAX_FALL = 2.0 ** (1 / 20)
# Lower end of a reference, as a multiple of its tensor's scale.
_MIN_REFERENCE = 2.0**-10
# Numbers of a tensor that are squared at once: 256 KiB of float64, which stay in a core's own cache.
_BLOCK_SIZE = 2**15
# Significant digits of a length: the last bits of a sum of squares differ between machines, and models must not.
_LENGTH_DIGITS = 6
# An update is reported if less than this share of it counts. An honest board with many samples takes more steps, and
# moves a few times as far as others.
_REPORTED_SHARE = 0.25

# The same for a batch-norm statistic: between honest boards with unlike data, statistics differ more than weights.
_REPORTED_STATISTICS = 0.1

# Key of all trained tensors together.
ALL_TRAINED = ""

# Root mean square of an update's change: by tensor of the whole model, and under `ALL_TRAINED` over all trained
# tensors. Elements of channels that the board doesn't hold count as unchanged; a mask's inactive ones are left out of
# the mean.
UpdateLengths = Mapping[str, float]


def measure_update(report: UpdateReport) -> UpdateLengths:
    """How far an update moves each tensor, and all trained ones together."""
    sent, trained = report.sent.tensors, report.trained
    tensor_lengths: dict[str, float] = {}
    all_squares, count = 0.0, 0.0
    for spec in trained.selection.architecture.tensors:
        size, square_sum = float(math.prod(spec.shape)), 0.0
        value, sent_value = trained.tensors.get(spec.name), sent.get(spec.name)
        if value is not None and sent_value is not None and value.shape == sent_value.shape and value.size:
            mask = trained.mask.get(spec.name)
            # The mean divides an element by the updates whose mask holds it: what is masked must not dilute the length.
            if mask is not None:
                size *= max(1, int(np.count_nonzero(mask))) / value.size
            square_sum = _sum_of_squares(
                value.reshape(-1), sent_value.reshape(-1), None if mask is None else mask.reshape(-1)
            )
            tensor_lengths[spec.name] = _round_length(math.sqrt(square_sum / size))
        # Statistics have limits of their own: they follow the data's scale, which says nothing of training.
        if spec.kind.is_trainable:
            all_squares, count = all_squares + square_sum, count + size
    return tensor_lengths | {ALL_TRAINED: _round_length(math.sqrt(all_squares / max(1.0, count)))}


def _sum_of_squares(
    values: npt.NDArray[np.float32], sent_values: npt.NDArray[np.float32], active: npt.NDArray[np.bool_] | None
) -> float:
    """Sum of squares of a change, block by block in the cache."""
    total = 0.0
    for start in range(0, values.size, _BLOCK_SIZE):
        block = slice(start, start + _BLOCK_SIZE)
        change = np.subtract(values[block], sent_values[block], dtype=np.float64)
        if active is not None:
            change *= active[block]
        total += float(np.dot(change, change))
    return total


@dataclass(frozen=True)
class RoundLimits:
    """The limits of a round, applied to its updates.

    Attributes:
        rejected: Reasons by device whose update is rejected.
        shares: By other device, then by tensor, the share of its change that counts; only tensors with a share below 1.
        reasons: By device, why much less counts than it sent.
        references: The renewed references, for `REFERENCES_MEMORY`.
    """

    rejected: Mapping[str, str]
    shares: Mapping[str, Mapping[str, float]]
    reasons: Mapping[str, str]
    references: dict[str, npt.NDArray[np.float64]]


def limit_round(
    updates: Mapping[str, UpdateLengths],
    references: Mapping[str, npt.NDArray[np.float64]],
    architecture: Architecture,
    model: Tensors,
    move_limit: float,
) -> RoundLimits:
    """Apply the limits to a round.

    Args:
        updates: Lengths by device.
        references: References of the round before, empty in the first.
        model: The global model; in the first round the initial one, from which the scales are taken.
        move_limit: Limit of a whole update, as a multiple of the median.
    """
    # The first round has no references: its limits are the medians alone.
    trained = {t.name for t in architecture.trainable}
    scaled = trained | {ALL_TRAINED}
    rejected = _rejections(updates, move_limit, float(references[ALL_TRAINED][0]) if ALL_TRAINED in references else 0.0)
    accepted = {device: lengths_of_device for device, lengths_of_device in updates.items() if device not in rejected}
    usual_lengths, new_references = {}, {}
    for name in sorted({name for lengths_of_device in updates.values() for name in lengths_of_device} | {ALL_TRAINED}):
        reference_before, scale = map(float, references.get(name, (0.0, _tensor_scale(name, trained, model))))
        upper, max_fall, lower = (
            (scale, _MAX_FALL, reference_before) if name in scaled else (math.inf, _MAX_GROWTH, 0.0)
        )
        nonzero_lengths = _nonzero_lengths(name, updates)
        new_references[name] = np.array(
            [_next_reference(reference_before, nonzero_lengths, scale * _MIN_REFERENCE, upper, max_fall), scale]
        )
        # All updates renew the reference, also rejected ones; the limits of this round go by those that are left.
        usual_length = _usual_length(
            reference_before, _nonzero_lengths(name, accepted), majority=len(nonzero_lengths) >= _MIN_MAJORITY_UPDATES
        )
        usual_lengths[name] = min(max(usual_length, lower), upper)
    # No tensor is held to less than what is usual over all of them: a median near 0 would forbid any move.
    limits = {n: move_limit * TENSOR_FACTOR * max(v, usual_lengths[ALL_TRAINED]) for n, v in usual_lengths.items()} | {
        ALL_TRAINED: move_limit * usual_lengths[ALL_TRAINED]
    }
    shares, reasons = {}, {}
    for device, lengths_of_device in sorted(accepted.items()):
        update_share = _counted_share(lengths_of_device[ALL_TRAINED], limits[ALL_TRAINED])
        tensor_shares = {n: _counted_share(v, limits[n]) for n, v in lengths_of_device.items() if n != ALL_TRAINED}
        # One share for all trained tensors keeps an update's direction; a single wild tensor is shortened further.
        tensor_shares = {n: min(s, update_share) if n in trained else s for n, s in tensor_shares.items()}
        smallest = min(tensor_shares, key=lambda n: tensor_shares[n], default=ALL_TRAINED)
        shares[device] = {n: s for n, s in tensor_shares.items() if s < 1}
        if smallest and tensor_shares[smallest] < (_REPORTED_SHARE if smallest in trained else _REPORTED_STATISTICS):
            name = ALL_TRAINED if smallest in trained and tensor_shares[smallest] == update_share else smallest
            subject = f"tensor {name}: " if name else ""
            distance = _distance_text(lengths_of_device[name], usual_lengths[name])
            reasons[device] = (
                f"its update stands out: {subject}{distance}; {tensor_shares[smallest]:.2g} of that counted"
            )
    return RoundLimits(rejected, shares, reasons, {**references, **new_references})


def shorten_update(report: UpdateReport, shares: Mapping[str, float]) -> UpdateReport:
    """The update with only a share of each tensor's change; tensors without a share stay bit for bit the same."""
    tensors = dict(report.trained.tensors)
    for name in shares.keys() & tensors.keys():
        before = report.sent.tensors[name].astype(np.float64)
        tensors[name] = (before + shares[name] * (tensors[name] - before)).astype(np.float32)
    return replace(report, trained=Submodel(report.trained.selection, tensors, report.trained.mask))


def capped_weights(samples: Mapping[str, int], median_multiple: float, absolute: int = 0) -> dict[str, int]:
    """Weights of devices: their samples, up to that multiple of the median and up to `absolute` (0 for no limit)."""
    limit = weight_limit(samples.values(), median_multiple, absolute)
    return {name: min(count, limit) for name, count in samples.items()}


def weight_limit(samples: Iterable[int], median_multiple: float, absolute: int = 0) -> int:
    """Largest weight of a device; arguments as for `capped_weights`."""
    return weight_limit_of_counts(Counter(samples), median_multiple, absolute)


def weight_limit_of_counts(counts: Mapping[int, int], median_multiple: float, absolute: int = 0) -> int:
    """The largest weight of a device, from the number of devices that have each number of samples."""
    limit, devices = absolute or 2**62, sum(counts.values())  # more samples than 2^62 no job accepts
    if median_multiple and devices >= _MIN_MAJORITY_UPDATES:
        sample_counts = sorted(counts)
        devices_up_to = accumulate(counts[n] for n in sample_counts)
        median = next(n for n, end in zip(sample_counts, devices_up_to, strict=True) if 2 * end >= devices)
        limit = min(limit, math.ceil(median_multiple * max(1, median)))
    return limit


def _rejections(updates: Mapping[str, UpdateLengths], move_limit: float, reference: float) -> dict[str, str]:
    """Reasons by device whose update is too long to count; fewer than half of the updates, as the median is one."""
    nonzero_lengths = _nonzero_lengths(ALL_TRAINED, updates)
    if len(nonzero_lengths) < _MIN_MAJORITY_UPDATES:
        return {}
    # The higher of two medians, and never less than the reference: in a quiet round no honest board is to stand out.
    usual = max(statistics.median_high(nonzero_lengths), reference)
    too_long = {
        device: row[ALL_TRAINED]
        for device, row in updates.items()
        if row[ALL_TRAINED] > REJECT_FACTOR * move_limit * usual
    }
    return {device: f"its update stands out: {_distance_text(length, usual)}" for device, length in too_long.items()}


def _nonzero_lengths(name: str, updates: Mapping[str, UpdateLengths]) -> list[float]:
    """Lengths of a tensor's changes, sorted, without those that are 0."""
    return sorted(lengths_of_device[name] for lengths_of_device in updates.values() if lengths_of_device.get(name))


def _usual_length(reference: float, nonzero_lengths: Sequence[float], *, majority: bool) -> float:
    """The length of which limits are multiples."""
    if not nonzero_lengths:
        return reference
    if not majority:
        return reference or nonzero_lengths[-1]
    # The lower of two medians: of an even number of updates half may be hostile and long.
    median = statistics.median_low(nonzero_lengths)
    return min(median, _MAX_GROWTH * reference) if reference else median


def _next_reference(reference: float, lengths: Sequence[float], lower: float, upper: float, max_fall: float) -> float:
    """The next reference; 0 as long as no update has changed the tensor."""
    if not lengths:
        return reference
    # Without a majority the reference moves only as far as the nearest update is from it.
    nearest_low, nearest_high = (
        (statistics.median_low(lengths),) * 2 if len(lengths) >= _MIN_MAJORITY_UPDATES else (lengths[0], lengths[-1])
    )
    renewed = min(max(reference or nearest_low, nearest_low), nearest_high)
    if reference:
        renewed = min(max(renewed, reference / max_fall), reference * _MAX_GROWTH)
    return min(max(renewed, lower), upper)


def _distance_text(length: float, usual: float) -> str:
    factor = length / usual if usual > 0 else math.inf
    return f"it moved {factor:.3g} times as far as is usual"


def _tensor_scale(name: str, trained: Collection[str], model: Tensors) -> float:
    if name == ALL_TRAINED:
        return max((_tensor_scale(n, trained, model) for n in trained), default=1.0)
    flat = model[name].astype(np.float64).reshape(-1)
    return max(1.0, _round_length(math.sqrt(float(np.dot(flat, flat)) / max(1, flat.size))))


def _counted_share(length: float, limit: float) -> float:
    return 1.0 if length <= limit else limit / length


def _round_length(length: float) -> float:

    return float(f"{length:.{_LENGTH_DIGITS}g}")


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
        is_checked: Whether it is in memory and has passed `Round.check`, so that it isn't checked again.
    """

    device: str
    key: Hashable
    weight: int
    samples: int
    read: Callable[[], UpdateReport] = field(compare=False)
    shares: Mapping[str, float] = field(default_factory=dict)
    is_checked: bool = field(default=False, compare=False)

    def report(self) -> UpdateReport:
        """Read the update, with the share of its change that counts."""
        report = replace(self.read(), weight=self.weight)
        return shorten_update(report, self.shares) if self.shares else report


_LOG = logging.getLogger(__name__)

# A device is named that reports more samples than this multiple of its limit: honest boards have a few times the
# median.
_REPORTED_SAMPLES_FACTOR = 8


@dataclass(frozen=True)
class LimitedUpdates:
    """A round's updates under its limits.

    Attributes:
        updates: Those that count, with the shares of their change that do.
        rejected: By device, why its update doesn't count.
        reasons: By device, why much less of its update counts than it sent.
        memories: The references that the job keeps for the next round.
        reduced: Devices whose update counts for less than it is, by however little, or whose samples count for much
            less.
    """

    updates: tuple[RoundUpdate, ...]
    rejected: Mapping[str, str]
    reasons: Mapping[str, str]
    memories: Memories
    reduced: frozenset[str] = frozenset()


class UpdateLimits:
    """Limits a round's updates, and keeps how far each moved, so that none is read twice.

    Args:
        uniform: Whether devices count alike, whatever their samples.
    """

    def __init__(self, job: Job, *, uniform: bool) -> None:
        self._job = job
        self._uniform = uniform
        # The noise that boards share out is accounted for sums in which updates don't depend on one another.
        self._move_limit = 0.0 if job.privacy.is_on and not job.privacy.is_local else job.move_limit
        self._lengths: dict[Hashable, UpdateLengths] = {}

    def note_lengths(self, update: RoundUpdate, measured: UpdateReport | UpdateLengths) -> None:
        """Note how far an update moved, from its checked report or from its lengths."""
        if self._move_limit and update.key not in self._lengths:
            self._lengths[update.key] = measure_update(measured) if isinstance(measured, UpdateReport) else measured

    def limit_updates(self, scene: Scene, updates: Sequence[RoundUpdate]) -> LimitedUpdates:
        """Apply the limits to all updates of a round; those that can't be read are left as they are."""
        heavy_devices, reasons = self._overweight_devices(updates)
        if not self._move_limit or not updates:
            return LimitedUpdates(tuple(updates), {}, reasons, {}, heavy_devices)
        for update in updates:
            if update.key not in self._lengths:
                try:
                    self.note_lengths(update, update.read())
                except (StorageError, MemoryError):
                    raise
                except Exception:  # noqa: BLE001 - it fails again where it is read to be added, with its reason
                    _LOG.debug("length of the update of %s", update.device, exc_info=True)
        # Lengths of updates that are not in this round any more would pile up over a job.
        self._lengths = {u.key: self._lengths[u.key] for u in updates if u.key in self._lengths}
        measured = [u for u in updates if u.key in self._lengths]
        limits = limit_round(
            {u.device: self._lengths[u.key] for u in measured},
            scene.memory.get(REFERENCES_MEMORY, {}),
            scene.architecture,
            scene.model,
            self._move_limit,
        )
        accepted = [u for u in updates if u.device not in limits.rejected]
        limited = tuple(replace(u, shares=limits.shares.get(u.device, {})) for u in accepted)
        reduced = heavy_devices.union(u.device for u in limited if u.shares) - limits.rejected.keys()
        reasons = {**reasons, **limits.reasons}
        return LimitedUpdates(limited, limits.rejected, reasons, {REFERENCES_MEMORY: limits.references}, reduced)

    def _overweight_devices(self, updates: Sequence[RoundUpdate]) -> tuple[frozenset[str], dict[str, str]]:
        """Devices that count for much less than the samples that they report, and why."""
        if self._uniform:
            return frozenset(), {}
        samples = {u.device: u.samples for u in updates}
        limit = weight_limit(samples.values(), self._job.weight_limit, self._job.most_samples)
        reasons = {
            device: f"it reports {count} samples and counts for {limit}, the most that one device may"
            for device, count in samples.items()
            if count > math.ceil(_REPORTED_SAMPLES_FACTOR * limit)
        }
        return frozenset(reasons), reasons
