"""Reshapes: axes that are split into factors and put together from others.

Runs of axes that hold the same elements are cut into common factors. What the atoms of an axis do not vary along needs
no care. Where they vary along factors that end up on several axes, only one of these can be cut: a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fedprune_export.channels.atoms import AtomRow
from fedprune_export.ir.trace import BATCH_EXTENT, BATCHES, Trace

Assignment = tuple[int | None, ...]  # per old axis the new axis that takes its atoms


@dataclass(frozen=True)
class Run:
    """Old and new axes that hold the same elements, and their common factors.

    `factors`: sizes whose product is that of either; `of_old`: per old axis the places of its factors; `of_new`: per
    new axis the places of its factors.
    """

    olds: list[int]
    news: list[int]
    factors: list[int]
    of_old: list[range]
    of_new: list[range]


def extents(seen: Trace, name: str) -> list[int] | None:
    """Sizes of a value with multiples of `BATCH_EXTENT` for multiples of the batch; None where one is neither."""
    out = []
    for a, b in zip(seen.shapes[name], seen.shapes_second[name], strict=True):
        times, rest = divmod(a, BATCHES[0])
        if a == b:
            out.append(a)
        elif rest == 0 and b == times * BATCHES[1]:
            out.append(times * BATCH_EXTENT)
        else:
            return None
    return out


def runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of old and new axes with equal products, in order."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        while True:
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                news.append(j)
                j += 1
            if (olds and news and a == b) or (i >= len(old) and j >= len(new)):
                break
        found.append((olds, news))
    if len(found) > 1 and not (found[-1][0] and found[-1][1]):
        tail = found.pop()
        found[-1] = (found[-1][0] + tail[0], found[-1][1] + tail[1])
    return found


def factored(olds: list[int], news: list[int], old: Sequence[int], new: Sequence[int]) -> Run | None:
    """The common factors of a run; None where the axes of one side end within a factor of the other."""
    ends = [
        list(itertools.accumulate((sizes[i] for i in axes), lambda a, b: a * b, initial=1))
        for axes, sizes in ((olds, old), (news, new))
    ]
    marks = sorted({*ends[0], *ends[1]})
    if ends[0][-1] != ends[1][-1] or not marks[0] or any(b % a for a, b in itertools.pairwise(marks)):
        return None
    factors = [b // a for a, b in itertools.pairwise(marks)]
    place = {mark: i for i, mark in enumerate(marks)}
    spans = [[range(place[a], place[b]) for a, b in itertools.pairwise(side)] for side in ends]
    return Run(olds, news, factors, spans[0], spans[1])


def common_factors(old: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[list[int]]] | None:
    """The coarsest sizes that make up both shapes, and per new axis the places of its factors; None without any."""
    factors: list[int] = []
    spans: list[list[int]] = []
    for olds, news in runs(old, new):
        run = factored(olds, news, old, new)
        if run is None:
            return None
        spans += [[len(factors) + f for f in span] for span in run.of_new]
        factors += run.factors
    return factors, spans


def assignments(run: Run, grids: Sequence[AtomRow], free: Sequence[bool]) -> list[Assignment]:
    """Ways to give the atoms of old axes to new ones, leading axes first; none where no axis can take any.

    Args:
        grids: Atoms of the old axes by factor.
        free: Per new axis of the value whether it follows the batch: then it can't take atoms.
    """
    takers: list[list[int | None]] = []
    for grid, span in zip(grids, run.of_old, strict=True):
        moving = {
            f for place, f in enumerate(span) if grid.shape[place] > 1 and (grid != grid.take([0], axis=place)).any()
        }
        takers.append([j for j, s in zip(run.news, run.of_new, strict=True) if moving & set(s) and not free[j]])
    carrying = [bool(t) for t in takers]
    if not any(carrying):
        return []
    found: list[Assignment] = []
    for option in itertools.product(*([*t, None] if t else [None] for t in takers)):
        taken = [j for j in option if j is not None]
        if len(set(taken)) != len(taken):
            continue
        # An old axis gives up only where all that could take it are taken.
        if any(j is None and any(k not in taken for k in t) for j, t in zip(option, takers, strict=True)):
            continue
        found.append(option)
    return found
