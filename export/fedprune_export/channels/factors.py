"""Common factors of the axes before and after a reshape, and which new axis can take an old axis' channels.

A *run* is consecutive axes that hold the same elements before and after: (8, 6) and (4, 12). Its *factors* are the
sizes whose products are the axes on either side: 4 · 2 · 6. Channels are named by *atoms* (integers per index of an
axis). Where the atoms of an axis vary along factors that end up on several new axes, only one of these can be cut:
there are several *assignments*.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedprune_export.channels.atoms import AtomRow
from fedprune_export.ir.trace import BATCH_EXTENT, TRACE_BATCHES, Trace

Assignment = tuple[int | None, ...]  # per old axis the new axis that takes its atoms


@dataclass(frozen=True)
class AxisRun:
    """Old and new axes that hold the same elements, and their common factors.

    `factors`: sizes whose product is that of either; `old_factors`: per old axis the indices of its factors;
    `new_factors`: per new axis the indices of its factors.
    """

    old_axes: list[int]
    new_axes: list[int]
    factors: list[int]
    old_factors: list[range]
    new_factors: list[range]


def extents(trace: Trace, name: str) -> list[int] | None:
    """Sizes of a value with multiples of `BATCH_EXTENT` for multiples of the batch; None where one is neither."""
    sizes = []
    for a, b in zip(trace.shapes[name], trace.shapes_second[name], strict=True):
        # The trace has two batch sizes: a size that is the same multiple of both follows the batch.
        times, rest = divmod(a, TRACE_BATCHES[0])
        if a == b:
            sizes.append(a)
        elif rest == 0 and b == times * TRACE_BATCHES[1]:
            sizes.append(times * BATCH_EXTENT)
        else:
            return None
    return sizes


def axis_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of old and new axes with equal products, in order."""
    old_ends, new_ends = _axis_ends(old), _axis_ends(new)
    total = max(old_ends[-1], new_ends[-1])
    # Axes of size 1 belong to the run after them, at the end to the last one.
    common_ends = [n for n in dict.fromkeys(old_ends) if n in new_ends and 1 < n < total]
    bounds = ([0, *map(ends.index, common_ends), len(ends) - 1] for ends in (old_ends, new_ends))
    old_runs, new_runs = ([list(range(*run)) for run in itertools.pairwise(side)] for side in bounds)
    return list(zip(old_runs, new_runs, strict=True))


def _axis_ends(sizes: Iterable[int]) -> list[int]:
    """Ends of axes as products of the sizes up to there, from 1 on."""
    return list(itertools.accumulate(sizes, operator.mul, initial=1))


def factor_run(old_axes: list[int], new_axes: list[int], old: Sequence[int], new: Sequence[int]) -> AxisRun | None:
    """The common factors of a run; None where the axes of one side end within a factor of the other."""
    ends = _axis_ends(old[i] for i in old_axes), _axis_ends(new[i] for i in new_axes)
    # Factors exist where every end divides the next one, whichever side it is of.
    marks = sorted({*ends[0], *ends[1]})
    if ends[0][-1] != ends[1][-1] or not marks[0] or any(b % a for a, b in itertools.pairwise(marks)):
        return None
    factors = [b // a for a, b in itertools.pairwise(marks)]
    index_of_mark = {mark: i for i, mark in enumerate(marks)}
    spans = [[range(index_of_mark[a], index_of_mark[b]) for a, b in itertools.pairwise(side)] for side in ends]
    return AxisRun(old_axes, new_axes, factors, spans[0], spans[1])


def common_factors(old: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[list[int]]] | None:
    """The coarsest sizes that make up both shapes, and per new axis the indices of its factors; None without any."""
    factors: list[int] = []
    spans: list[list[int]] = []
    for olds, news in axis_runs(old, new):
        run = factor_run(olds, news, old, new)
        if run is None:
            return None
        spans += [[len(factors) + f for f in span] for span in run.new_factors]
        factors += run.factors
    return factors, spans


def assignments(run: AxisRun, grids: Sequence[AtomRow], free: Sequence[bool]) -> list[Assignment]:
    """All assignments of old axes' atoms to new axes, leading axes first; empty where no axis can take any.

    Args:
        grids: Atoms of the old axes by factor.
        free: Per new axis of the value whether it follows the batch: then it can't take atoms.
    """
    takers: list[list[int | None]] = []
    for grid, span in zip(grids, run.old_factors, strict=True):
        varying_factors = {
            f for index, f in enumerate(span) if grid.shape[index] > 1 and (grid != grid.take([0], axis=index)).any()
        }
        takers.append(
            [j for j, s in zip(run.new_axes, run.new_factors, strict=True) if varying_factors & set(s) and not free[j]]
        )
    if not any(takers):
        return []
    options: list[Assignment] = []
    for option in itertools.product(*([*t, None] if t else [None] for t in takers)):
        used_axes = [j for j in option if j is not None]
        if len(set(used_axes)) != len(used_axes):
            continue
        # An old axis stays without a taker only where all its candidates take another one: anything less cuts less.
        if any(j is None and any(k not in used_axes for k in t) for j, t in zip(option, takers, strict=True)):
            continue
        options.append(option)
    return options
