"""Computes how far each update of a round may move the next model, from how far the others moved it.

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
| distance from the mean | the median or the reference; beyond it the share falls | `update_limits.limit_distances` |

m is the job's `move_limit`. A length is ‖Δ_k‖, the root of a change's sum of squares divided by the elements of the
whole model's tensor: how far the update alone would move the model, whatever the board's width, without elements that a
mask leaves out. A scale is the root mean square of the initial tensor, but at least 1. The job keeps references from
round to round, and renews them from all valid updates; those without any change are left out of medians.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import sum_of_squares
from fedprune.coordination.update_lengths import ALL_TRAINED, UpdateLengths, round_length
from fedprune.coordination.weight_limits import MIN_MAJORITY_UPDATES
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Tensors

# Key of the references in a job's memory: per tensor its reference and its scale. They outlive a round, since a single
# round's median is whatever its boards say.
REFERENCES_MEMORY = "move_reference"

# Limit of a single tensor, as a multiple of `move_limit`: tensors differ more between boards than updates do.
TENSOR_FACTOR = 2.0

# An update longer than this many limits is rejected. None of the honest updates that we measured was.
REJECT_FACTOR = 8.0

# Largest factor by which a reference grows in a round, and by which a round's median counts as longer than it.
_MAX_GROWTH = 2.0
# Largest factor by which a trained tensor's reference falls in a round; for batch-norm statistics it is `_MAX_GROWTH`.
_MAX_FALL = 2.0 ** (1 / 20)
# Lower end of a reference, as a multiple of its tensor's scale.
_MIN_REFERENCE = 2.0**-10
# An update is reported if less than this share of it counts. An honest board with many samples takes more steps, and
# moves a few times as far as others.
_REPORTED_SHARE = 0.25

# The same for a batch-norm statistic: between honest boards with unlike data, statistics differ more than weights.
_REPORTED_STATISTICS = 0.1


@dataclass(frozen=True)
class RoundLimits:
    """The limits of a round, applied to its updates.

    Attributes:
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
    """Apply the limits to a round; `references` are those of the round before, empty in the first round.

    The scales are taken from `model` in the first round, where it is the initial one.
    """
    trained = {t.name for t in architecture.trainable}
    # The first round has no references: its limits are the medians alone.
    first_reference = float(references[ALL_TRAINED][0]) if ALL_TRAINED in references else 0.0
    rejected = _rejections(updates, move_limit, first_reference)
    accepted = {device: lengths for device, lengths in updates.items() if device not in rejected}
    usual_lengths, new_references = {}, {}
    for name in sorted({ALL_TRAINED}.union(*updates.values())):
        reference, scale = map(float, references.get(name, (0.0, _tensor_scale(name, trained, model))))
        is_scaled = name in trained or name == ALL_TRAINED
        lower, upper, max_fall = (reference, scale, _MAX_FALL) if is_scaled else (0.0, math.inf, _MAX_GROWTH)
        nonzero_lengths = _nonzero_lengths(name, updates)
        # All updates renew the reference, also rejected ones; the limits of this round go by those that are left.
        next_reference = _next_reference(reference, nonzero_lengths, scale * _MIN_REFERENCE, upper, max_fall)
        new_references[name] = np.array([next_reference, scale])
        has_majority = len(nonzero_lengths) >= MIN_MAJORITY_UPDATES
        usual_length = _usual_length(reference, _nonzero_lengths(name, accepted), majority=has_majority)
        usual_lengths[name] = min(max(usual_length, lower), upper)
    # No tensor is held to less than what is usual over all of them: a median near 0 would forbid any move.
    limits = {n: move_limit * TENSOR_FACTOR * max(v, usual_lengths[ALL_TRAINED]) for n, v in usual_lengths.items()}
    limits[ALL_TRAINED] = move_limit * usual_lengths[ALL_TRAINED]
    shares, reasons = {}, {}
    for device, lengths in sorted(accepted.items()):
        update_share = _counted_share(lengths[ALL_TRAINED], limits[ALL_TRAINED])
        tensor_shares = {n: _counted_share(v, limits[n]) for n, v in lengths.items() if n != ALL_TRAINED}
        # One share for all trained tensors keeps an update's direction; a single wild tensor is shortened further.
        tensor_shares = {n: min(s, update_share) if n in trained else s for n, s in tensor_shares.items()}
        shares[device] = {n: share for n, share in tensor_shares.items() if share < 1}
        if reason := _limit_reason(lengths, usual_lengths, update_share, tensor_shares, trained):
            reasons[device] = reason
    return RoundLimits(rejected, shares, reasons, {**references, **new_references})


def _limit_reason(
    lengths: UpdateLengths,
    usual_lengths: UpdateLengths,
    update_share: float,
    tensor_shares: Mapping[str, float],
    trained: Collection[str],
) -> str:
    """Why much less of an update counts than was sent; empty if it doesn't."""
    smallest = min(tensor_shares, key=lambda n: tensor_shares[n], default=ALL_TRAINED)
    if not smallest or tensor_shares[smallest] >= (_REPORTED_SHARE if smallest in trained else _REPORTED_STATISTICS):
        return ""
    name = ALL_TRAINED if smallest in trained and tensor_shares[smallest] == update_share else smallest
    subject = f"tensor {name}: " if name else ""
    distance = _distance_text(lengths[name], usual_lengths[name])
    return f"its update stands out: {subject}{distance}; {tensor_shares[smallest]:.2g} of that counted"


def _rejections(updates: Mapping[str, UpdateLengths], move_limit: float, reference: float) -> dict[str, str]:
    """Reasons by device whose update is too long to count; fewer than half of the updates, as the median is one."""
    nonzero_lengths = _nonzero_lengths(ALL_TRAINED, updates)
    if len(nonzero_lengths) < MIN_MAJORITY_UPDATES:
        return {}
    # The higher of two medians, and never less than the reference: in a quiet round no honest board is to stand out.
    usual = max(statistics.median_high(nonzero_lengths), reference)
    limit = REJECT_FACTOR * move_limit * usual
    too_long = {device: row[ALL_TRAINED] for device, row in updates.items() if row[ALL_TRAINED] > limit}
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
        (statistics.median_low(lengths),) * 2 if len(lengths) >= MIN_MAJORITY_UPDATES else (lengths[0], lengths[-1])
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
    values = model[name].astype(np.float64)
    return max(1.0, round_length(math.sqrt(sum_of_squares(values) / max(1, values.size))))


def _counted_share(length: float, limit: float) -> float:
    return 1.0 if length <= limit else limit / length
