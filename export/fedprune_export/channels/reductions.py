"""Pooling, reductions, sorting, and what measures sizes."""

from __future__ import annotations

import numpy as np

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Node

ADDING = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")
"""Reductions to which a channel that is zero adds nothing: cutting it is the same as masking it."""


@rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
def pooling(channels: Channels, node: Node) -> None:
    """Channels pass, places stay; so do channels that a maximum's index counts."""
    x = channels.of(node, 0)
    places = any(row.any() for row in x[2:])
    if places or (len(node.outputs) > 1 and node.outputs[1]):
        channels.fix(x)
        channels.still_outputs(node)
        return
    shape = channels.shape(node.outputs[0])
    channels.out(node, [x[0], x[1], *(still(n) for n in shape[2:])])


@rule(
    *ADDING,
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin"),
)
def reduction(channels: Channels, node: Node) -> None:
    """The axes that are left pass. Of those reduced away channels stay, because cutting them would change the result,

    unless the result is a sum (the channels that are lost are those that add nothing to it) or normalises weights: a
    weight's mean or length is taken over what is kept of it, as a layer norm's is.
    """
    x = channels.of(node, 0)
    gone = reduced_axes(channels, node)
    if node.op not in ADDING and (node.op != "ReduceMean" or channels.follows_data(node)):
        if any(x[a].any() for a in gone):
            channels.notes.append(f"{node.op} {node.name} reduces over channels: they stay.")
        channels.fix([x[a] for a in gone])
    if node.attrs.get("keepdims", 1):
        channels.out(node, [still(1) if a in gone else x[a] for a in range(len(x))])
    else:
        channels.out(node, [x[a] for a in range(len(x)) if a not in gone])


def reduced_axes(channels: Channels, node: Node) -> set[int]:
    """Which axes a reduction takes away."""
    rank = len(channels.of(node, 0))
    if node.op in ("ArgMax", "ArgMin"):
        return {int(node.attrs.get("axis", 0)) % rank}
    axes = node.attrs.get("axes")
    if axes is None and channels.has(node, 1):
        number = channels.number(node, 1)
        axes = number.tolist() if number is not None else None
    return {int(a) % rank for a in (axes if axes else range(rank))}


@rule("CumSum", "TopK")
def along_one_axis(channels: Channels, node: Node) -> None:
    """Channels that are added up one after the other, or sorted, stay; other axes pass."""
    x = list(channels.of(node, 0))
    if node.op == "TopK":
        axis: int | None = int(node.attrs.get("axis", -1))
    else:
        number = channels.number(node, 1)
        axis = int(number[0]) if number is not None else None
    gone = set(range(len(x))) if axis is None else {axis % len(x)}
    if any(x[a].any() for a in gone):
        channels.notes.append(f"{node.op} {node.name} works along channels: they stay.")
    channels.fix([x[a] for a in gone])
    for i, name in enumerate(node.outputs):
        if name:
            shape = channels.shape(name)
            channels.out(node, [still(shape[a]) if a in gone else row for a, row in enumerate(x)], i)


@rule("Trilu")
def triangle(channels: Channels, node: Node) -> None:
    """The axes of its matrices stay."""
    x = list(channels.of(node, 0))
    channels.fix(x[-2:])
    channels.out(node, [*x[:-2], *(np.zeros_like(r) for r in x[-2:])])


@rule("Shape", "Size", "Range")
def measure(channels: Channels, node: Node) -> None:
    """Sizes are not channels: the inputs may be cut, the outputs are plain numbers."""
    channels.still_outputs(node)


@rule("ConstantOfShape")
def filled(channels: Channels, node: Node) -> None:
    """Every index holds the same number: as many are made as are needed."""
    name = node.outputs[0]
    channels.out(node, fresh_axes(channels, name, [None] * len(channels.shape(name))))


def fresh_axes(channels: Channels, name: str, rows: list[AtomRow | None]) -> list[AtomRow]:
    """Rows of a value: new atoms for an axis without a row, unless it follows the batch."""
    shape, dims = channels.shape(name), channels.seen.dims(name)
    return [
        row if row is not None else (channels.atoms.fresh(n) if dim is not None else still(n))
        for row, n, dim in zip(rows, shape, dims, strict=True)
    ]
