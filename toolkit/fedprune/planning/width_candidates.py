"""Candidates for a board's widths, from wide to narrow, each near a uniform share of all groups of channels.

Kernels take channels in blocks, so that times jump where a width passes a multiple of a block. A candidate therefore
keeps a multiple of channels of every group, unless the table of measured times expects uniform widths of equally many
MACs to be faster. Candidates nest: what a narrow one keeps, every wider one keeps, so that a looser limit never gives a
narrower model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture, widths_at
from fedprune.planning.costs import memory_seconds
from fedprune.planning.kernel_workload import ArchitectureKey, workload
from fedprune.planning.latency_model import LatencyTable

# The multiples to which channels are rounded, in the order of trial; small groups take a smaller one.
MULTIPLES = (16, 8, 4)

# Multiples that a group must have room for.
_MIN_MULTIPLES = 4

# Shares of uniform width among which the one of equal work is searched.
_UNIFORM_SHARES = 256

# How much longer a candidate may take, step and latency together, than the fastest of the same density.
_MAX_TIME_FACTOR = 1.1

# Times that differ by a smaller factor are equal: they are sums of many terms, whose rounding errors differ.
_EQUAL_TIME_FACTOR = 1 + 1e-9

Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WidthCandidate:
    """Widths (kept channels per group) near a share `density` of every group. They are multiples of `multiple` where
    groups are large enough; 1 for uniform widths."""

    density: float
    widths: tuple[int, ...]
    multiple: int


def width_candidates(
    architecture: Architecture, table: LatencyTable, batch: int, densities: Sequence[float], bandwidth: float = math.inf
) -> tuple[WidthCandidate, ...]:
    """The candidates of a model on a board, widest first: at most one for each density. `table` has the times of the
    board's kernels; `bandwidth` of its main memory, in bytes per second, bounds a step beyond these."""
    model = _TimeModel(architecture, table, table.to_json(), batch, bandwidth)
    return _search_candidates(model, tuple(sorted(set(densities), reverse=True)))


def widths_in_multiples(architecture: Architecture, density: float, multiple: int) -> tuple[int, ...]:
    """Widths near a share of every group that are multiples of a power of two, of a smaller one in small groups."""
    widths = []
    for group in architecture.groups:
        group_multiple = multiple
        while group_multiple > 1 and group.size < _MIN_MULTIPLES * group_multiple:
            group_multiple //= 2
        # The whole group is as good as a multiple: a kernel pads it no more than the whole model's.
        nearest = max(group_multiple, round(density * group.size / group_multiple) * group_multiple)
        widths.append(min(nearest, group.size))
    return tuple(widths)


@dataclass(frozen=True)
class _UniformWidths:
    """Uniform widths, sorted by their MACs: what candidates are compared with."""

    candidates: tuple[WidthCandidate, ...]
    macs: tuple[float, ...]

    def index_covering(self, macs: float) -> int:
        """The index of the narrowest widths with at least as many MACs."""
        return min(bisect_left(self.macs, macs), len(self.macs) - 1)


class _TimeModel:
    """Computes times of steps and predictions. Compared by its inputs, so that results can be cached."""

    def __init__(self, architecture: Architecture, table: LatencyTable, key: str, batch: int, bandwidth: float) -> None:
        self.architecture, self.table, self.batch, self.bandwidth = architecture, table, batch, bandwidth
        self.key = (architecture.digest, key, batch, bandwidth)

    def times(self, widths: Sequence[tuple[int, ...]]) -> Times:
        """Times of steps and predictions: [2, n]."""
        floor = memory_seconds(self.architecture, widths, self.batch, self.bandwidth)
        steps = np.maximum(floor, self.table.step_seconds(self.architecture, widths, self.batch))
        return np.stack([steps, self.table.latency_seconds(self.architecture, widths)])

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TimeModel) and self.key == other.key


@lru_cache(maxsize=8)
def _uniform_widths(key: ArchitectureKey) -> _UniformWidths:
    density_of_widths: dict[tuple[int, ...], float] = {}
    for k in range(1, _UNIFORM_SHARES + 1):
        density_of_widths.setdefault(widths_at(key.architecture, k / _UNIFORM_SHARES), k / _UNIFORM_SHARES)
    widths = list(density_of_widths)
    macs = workload(key.architecture).forward_macs(widths)
    order = np.argsort(macs, kind="stable")
    return _UniformWidths(
        tuple(WidthCandidate(density_of_widths[widths[i]], widths[i], 1) for i in order), tuple(macs[order].tolist())
    )


@lru_cache(maxsize=8)
def _search_candidates(model: _TimeModel, densities: tuple[float, ...]) -> tuple[WidthCandidate, ...]:
    architecture, uniform = model.architecture, _uniform_widths(ArchitectureKey(model.architecture))
    times = model.times([c.widths for c in uniform.candidates])
    chosen_candidates: list[WidthCandidate] = []
    widths_above = architecture.sizes
    for density in densities:
        multiple_of_widths = {widths_at(architecture, density): 1}
        if density < 1:
            for m in MULTIPLES:
                multiple_of_widths.setdefault(widths_in_multiples(architecture, density, m), m)
        # Clipped to the wider candidate chosen before, so that candidates nest.
        clipped = ((tuple(map(min, w, widths_above)), m) for w, m in multiple_of_widths.items())
        candidates = list(dict.fromkeys(WidthCandidate(density, w, m) for w, m in clipped))
        time_costs, macs = _time_per_mac(model, candidates, uniform, times, widths_above)
        # Of those that are about as fast the widest: coarse steps would leave a board's memory unused.
        nearly_fastest = [i for i in range(len(candidates)) if time_costs[i] <= _MAX_TIME_FACTOR * min(time_costs)]
        index = max(nearly_fastest, key=lambda i: (candidates[i].widths != widths_above, macs[i]))
        if density == densities[-1]:
            index = 0  # what the smallest board can hold is no question of speed
        elif time_costs[index] == math.inf:
            continue
        if candidates[index].widths != widths_above or not chosen_candidates:
            chosen_candidates.append(candidates[index])
            widths_above = candidates[index].widths
    return tuple(chosen_candidates)


def _time_per_mac(
    model: _TimeModel,
    candidates: Sequence[WidthCandidate],
    uniform: _UniformWidths,
    uniform_s: Times,
    above: Sequence[int],
) -> tuple[list[float], Times]:
    """Per candidate, (step time per MAC) × (latency per MAC), where less is better, and its MACs. The product is
    infinite if uniform widths of equal work are faster, or if the candidate is slower than the wider one above it."""
    widths = [*(c.widths for c in candidates), tuple(above)]
    macs = workload(model.architecture).forward_macs(widths)
    times = model.times(widths)
    time_costs = []
    for i in range(len(candidates)):
        relative = times[:, i] / uniform_s[:, uniform.index_covering(float(macs[i]))]
        is_fast_enough = bool(
            (relative <= _EQUAL_TIME_FACTOR).all() and (times[:, i] <= _EQUAL_TIME_FACTOR * times[:, -1]).all()
        )
        time_costs.append(float(times[:, i].prod() / macs[i] ** 2) if is_fast_enough else math.inf)
    return time_costs, macs
