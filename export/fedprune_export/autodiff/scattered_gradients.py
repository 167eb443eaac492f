"""Gradients of values whose elements were picked by index: dy is put back where each element came from, on zeros.

dy is the gradient of the picked values; `tape.graph.emit` adds a node, and returns the name of its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.autodiff.tape import Dim, Shape, Tape
from fedprune_export.ir.graph import Array, Graph

# Up to this many picks of one element its gradient is a sum of gathers; beyond, rows are added one by one.
_MAX_GATHERS = 4


def put_back(tape: Tape, dy: str, shape: Shape, runs: Sequence[tuple[int, Dim, Dim]]) -> str:
    """Pad the gradient of runs along some axes with zeros to the shape of the whole."""
    before: list[Dim] = [0] * len(shape)
    after: list[Dim] = [0] * len(shape)
    for axis, begin, stop in runs:
        before[axis], after[axis] = begin, tape.difference(shape[axis], stop)
    return tape.graph.emit("Pad", dy, tape.sizes(before + after))


def scatter_add(tape: Tape, x: str, indices: str, dy: str, axis: int) -> str:
    """The gradient of a value whose elements were gathered along an axis; gradients of equal indices add up."""
    g = tape.graph
    zeros = g.emit("ConstantOfShape", tape.shape_of(x))
    return g.emit("ScatterElements", zeros, indices, dy, attrs={"axis": axis, "reduction": "add"})


def scatter_picks(tape: Tape, dy: str, shape: Shape, axis: int, picked: Array, size: int) -> str:
    """The gradient of a value whose elements were gathered along an axis by constant indices.

    Args:
        picked: Which indices were picked, in order; some maybe several times or never.
        size: How many indices the axis had before.
    """
    whole = (*shape[:axis], size, *shape[axis + 1 :])
    if np.array_equal(picked, np.arange(picked[0], picked[0] + len(picked))):
        # The gradient of neighbours that were picked once each, in their order: zeros stand before and behind it.
        return dy if len(picked) == size else put_back(tape, dy, whole, [(axis, int(picked[0]), int(picked[-1]) + 1)])
    uses = np.bincount(picked, minlength=size)
    if uses.max() > _MAX_GATHERS:
        return scatter_rows(tape, dy, whole, axis, tape.graph.constant(picked[:, None], np.int64), 1)
    return _sum_gathers(tape.graph, dy, len(shape), axis, picked, uses)


def scatter_rows(tape: Tape, dy: str, shape: Shape, axis: int, indices: str, rank: int) -> str:
    """The gradient of a value of `shape` that was indexed along an axis, by indices of `rank` axes and one of 1."""
    g = tape.graph
    # With the indexed axis first, rows are added to zeros where they came from.
    first, axes = [axis, *(i for i in range(len(shape)) if i != axis)], range(len(shape) + rank - 1)
    inner = axes[axis : axis + rank]
    rows = g.emit("Transpose", dy, attrs={"perm": [*inner, *(i for i in axes if i not in inner)]}) if axis else dy
    zeros = g.emit("ConstantOfShape", tape.sizes([shape[i] for i in first]))
    total = g.emit("ScatterND", zeros, indices, rows, attrs={"reduction": "add"})
    return g.emit("Transpose", total, attrs={"perm": np.argsort(first).tolist()}) if axis else total


def _sum_gathers(g: Graph, dy: str, rank: int, axis: int, picked: Array, uses: Array) -> str:
    """The gradient as a sum: in turn k every element adds the k-th gradient that was taken from it, or a zero.

    `uses`: how often each element was picked.
    """
    count, padded = len(picked), dy
    if uses.min() < uses.max():
        pads = [0] * (2 * rank)
        pads[rank + axis] = 1  # an index of a zero, for elements that were picked less often
        padded = g.emit("Pad", dy, g.ints(*pads))
    total = ""
    order_of_picks = np.argsort(picked, kind="stable")
    first = np.concatenate([[0], np.cumsum(uses)])[:-1]
    for turn in range(int(uses.max())):
        sources = np.where(uses > turn, order_of_picks[np.minimum(first + turn, count - 1)], count)
        gathered = g.emit("Gather", padded, g.constant(sources, np.int64), attrs={"axis": axis})
        total = g.emit("Add", total, gathered) if total else gathered
    return total


def index_range(tape: Tape, dim: Dim) -> str:
    """0, 1, 2 and so on up to a dimension's size."""
    g = tape.graph
    if isinstance(dim, int):
        return g.ints(*range(dim))
    ones = g.emit("ConstantOfShape", tape.size(dim), attrs={"value": np.ones(1, np.int64)})
    return g.emit("CumSum", ones, g.constant(0, np.int64), attrs={"exclusive": 1})
