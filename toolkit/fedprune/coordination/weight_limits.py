"""Limits how many samples a device counts for, so that no device decides a round's mean by what it reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate

# Fewest updates that have an honest majority if one of them is hostile.
MIN_MAJORITY_UPDATES = 3


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
    if median_multiple and devices >= MIN_MAJORITY_UPDATES:
        sample_counts = sorted(counts)
        devices_up_to = accumulate(counts[n] for n in sample_counts)
        median = next(n for n, end in zip(sample_counts, devices_up_to, strict=True) if 2 * end >= devices)
        limit = min(limit, math.ceil(median_multiple * max(1, median)))
    return limit
