"""Gradients of values whose elements were picked by index: dy is put back where each element came from, on zeros.

dy is the gradient of the picked values; `tape.graph.emit` adds a node, and returns the name of its output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.autodiff.tape import Dim, Shape, Tape
from fedprune_export.ir.graph import Array, Graph

# Up to this many picks of one element its gradient is a sum of gathers; beyond, a product with a 0/1 matrix.
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
    if np.array_equal(picked, np.arange(picked[0], picked[0] + len(picked))):
        # The gradient of neighbours that were picked once each, in their order: zeros stand before and behind it.
        rank = len(shape)
        pads = [0] * (2 * rank)
        pads[axis], pads[rank + axis] = int(picked[0]), size - int(picked[-1]) - 1
        return tape.graph.emit("Pad", dy, tape.graph.ints(*pads)) if any(pads) else dy
    uses = np.bincount(picked, minlength=size)
    if uses.max() > _MAX_GATHERS:
        return _multiply_by_picks(tape.graph, dy, len(shape), axis, picked, size)
    return _sum_gathers(tape.graph, dy, len(shape), axis, picked, uses)


def _multiply_by_picks(g: Graph, dy: str, rank: int, axis: int, picked: Array, size: int) -> str:
    """The gradient as a product with a 0/1 matrix of picks and elements, with `axis` as the last one for it."""
    order = [*(i for i in range(rank) if i != axis), axis]
    is_last = axis == rank - 1
    transposed = dy if is_last else g.emit("Transpose", dy, attrs={"perm": order})
    matrix = (picked[:, None] == np.arange(size)).astype(np.float32)
    spread = g.emit("MatMul", transposed, g.constant(matrix, np.float32))
    return spread if is_last else g.emit("Transpose", spread, attrs={"perm": np.argsort(order).tolist()})


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
