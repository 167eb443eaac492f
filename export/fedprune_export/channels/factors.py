"""Common factors of the axes before and after a reshape, and which new axis can take an old axis' channels.

A *run* is consecutive axes that hold the same elements before and after: (8, 6) and (4, 12). Its *factors* are the
sizes whose products are the axes on either side: 4 · 2 · 6. Channels are named by *atoms* (integers per index of an
axis). Where the atoms of an axis vary along factors that end up on several new axes, only one of these can be cut:
there are several *assignments*.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
    runs_of_axes: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_axes, new_axes, old_product, new_product = [], [], 1, 1
        while True:
            if i < len(old) and (old_product <= new_product or j >= len(new)):
                old_product *= old[i]
                old_axes.append(i)
                i += 1
            elif j < len(new):
                new_product *= new[j]
                new_axes.append(j)
                j += 1
            if (old_axes and new_axes and old_product == new_product) or (i >= len(old) and j >= len(new)):
                break
        runs_of_axes.append((old_axes, new_axes))
    # Trailing axes of size 1 are a run with one side only: they belong to the run before.
    if len(runs_of_axes) > 1 and not (runs_of_axes[-1][0] and runs_of_axes[-1][1]):
        last_run = runs_of_axes.pop()
        runs_of_axes[-1] = (runs_of_axes[-1][0] + last_run[0], runs_of_axes[-1][1] + last_run[1])
    return runs_of_axes


def factor_run(old_axes: list[int], new_axes: list[int], old: Sequence[int], new: Sequence[int]) -> AxisRun | None:
    """The common factors of a run; None where the axes of one side end within a factor of the other."""
    ends = [
        list(itertools.accumulate((sizes[i] for i in axes), lambda a, b: a * b, initial=1))
        for axes, sizes in ((old_axes, old), (new_axes, new))
    ]
    # Ends of axes as products of sizes. Factors exist where every end divides the next one, whichever side it is of.
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
    carrying = [bool(t) for t in takers]
    if not any(carrying):
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
