"""Operators that move indices about: transpose, concat, split, slice, gather, pad, expand, tile, resize."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.reductions import fresh_axes
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Graph, Node


@rule("Concat")
def concat(channels: Channels, node: Node) -> None:
    """Rows one after the other along the axis; the other axes are tied."""
    parts = [channels.rows[name] for name in node.inputs]
    axis = int(node.attrs["axis"]) % len(parts[0])
    out = list(parts[0])
    for other in parts[1:]:
        for i, row in enumerate(other):
            if i != axis:
                channels.atoms.tie(out[i], row)
                out[i] = np.minimum(out[i], row)
    out[axis] = np.concatenate([p[axis] for p in parts])
    channels.out(node, out)


@rule("Split")
def split(channels: Channels, node: Node) -> None:
    """Rows in parts along the axis."""
    x = list(channels.of(node, 0))
    axis = int(node.attrs.get("axis", 0)) % len(x)
    sizes = [channels.shape(name)[axis] if name else 0 for name in node.outputs]
    if channels.seen.dims(node.inputs[0])[axis] is None or sum(sizes) != x[axis].size:
        channels.fix([x[axis]])
        for i, n in enumerate(sizes):
            channels.out(node, [*x[:axis], still(n), *x[axis + 1 :]], i)
        return
    for i, taken in enumerate(np.split(np.arange(x[axis].size), np.cumsum(sizes)[:-1])):
        channels.out(node, [*x[:axis], channels.pick(x[axis], taken), *x[axis + 1 :]], i)


@rule("Transpose")
def transpose(channels: Channels, node: Node) -> None:
    """Axes change places."""
    x = channels.of(node, 0)
    order = node.attrs.get("perm") or list(range(len(x)))[::-1]
    channels.out(node, [x[i] for i in order])


@rule("Pad")
def pad(channels: Channels, node: Node) -> None:
    """Added indices stay; reflecting or repeating padding of a channel axis fixes it."""
    x = channels.of(node, 0)
    given = channels.number(node, 1)
    channels.fix_inputs(node, 1)
    if given is None:
        channels.fix(x)
        channels.still_outputs(node)
        return
    amounts = given.tolist()
    out = []
    for i, row in enumerate(x):
        before, after = int(amounts[i]), int(amounts[i + len(x)])
        if before < 0 or after < 0 or ((before or after) and node.attrs.get("mode", "constant") != "constant"):
            channels.atoms.fix(row)
            row = still(row.size + before + after)
            before = after = 0
        out.append(np.concatenate([still(before), row, still(after)]))
    channels.out(node, out)


def sliced(graph: Graph, node: Node, rank: int) -> dict[int, slice] | None:
    """The indices that a Slice takes along each of its axes; None where that isn't constant."""
    constants = [graph.initializers.get(name) if name else None for name in node.inputs[1:]]
    count = len(node.inputs) - 1
    if count < 2 or constants[0] is None or constants[1] is None:
        return None
    if any(node.inputs[i + 1] and constants[i] is None for i in range(2, count)):
        return None
    starts, ends = (constants[i].reshape(-1).tolist() for i in (0, 1))  # type: ignore[union-attr]
    axes = constants[2].reshape(-1).tolist() if count > 2 and constants[2] is not None else range(len(starts))
    steps = constants[3].reshape(-1).tolist() if count > 3 and constants[3] is not None else [1] * len(starts)
    out = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # Backwards, an end at the very bottom means that index 0 is included.
        stop = None if step < 0 and end < -(2**30) else int(end)
        out[int(axis) % rank] = slice(int(start), stop, int(step))
    return out


@rule("Slice")
def slicing(channels: Channels, node: Node) -> None:
    """Indices that are taken pass; where each of a few neighbours is taken, the neighbours are kept or cut together."""
    x = channels.of(node, 0)
    shape, dims = channels.shape(node.outputs[0]), channels.seen.dims(node.inputs[0])
    taken = sliced(channels.graph, node, len(x))
    out = list(x)
    if taken is None:
        axes = list(range(channels.shape(node.inputs[1])[0]))
        if channels.has(node, 3):
            given = channels.number(node, 3)
            axes = list(range(len(x))) if given is None else [int(a) % len(x) for a in given]
        channels.fix([x[a] for a in axes])
        for axis in axes:
            out[axis] = still(shape[axis])
    else:
        for axis, part in taken.items():
            row, step = x[axis], part.step
            if dims[axis] is None or row[part].size != shape[axis]:
                channels.atoms.fix(row)
                out[axis] = still(shape[axis])
                continue
            if row.any() and step > 1 and row.size % step == 0:
                blocks = row.reshape(-1, step)
                channels.atoms.tie(blocks, blocks[:, :1])
            out[axis] = channels.pick(row, np.arange(row.size)[part])
    channels.out(node, out)


@rule("Gather")
def gather(channels: Channels, node: Node) -> None:
    """Constant indices take channels; a table that is looked up by data, or indices that repeat, keep theirs."""
    x, indices = channels.of(node, 0), channels.of(node, 1)
    axis = int(node.attrs.get("axis", 0)) % len(x)
    row = x[axis]
    constant = channels.graph.initializers.get(node.inputs[1])
    channels.fix(indices)
    middle: list[AtomRow] = [np.zeros_like(r) for r in indices]
    if row.any():
        if constant is None or constant.ndim > 1 or constant.size > row.size:
            channels.atoms.fix(row)
        elif constant.ndim == 0:
            channels.atoms.fix(row[constant.reshape(1)])
        else:
            middle = [channels.pick(row, constant % row.size)]
    channels.out(node, [*x[:axis], *middle, *x[axis + 1 :]])


@rule("GatherND")
def gather_nd(channels: Channels, node: Node) -> None:
    """Axes that are looked up stay, those behind them pass."""
    x, indices = channels.of(node, 0), channels.of(node, 1)
    looked = int(node.attrs.get("batch_dims", 0)) + channels.shape(node.inputs[1])[-1]
    channels.fix([*x[:looked], *indices])
    channels.out(node, [*(np.zeros_like(r) for r in indices[:-1]), *x[looked:]])


@rule("ScatterND")
def scatter_nd(channels: Channels, node: Node) -> None:
    """Axes that are looked up stay, those behind them are tied to what is put there."""
    x, indices, updates = (channels.of(node, i) for i in range(3))
    looked = channels.shape(node.inputs[1])[-1]
    passed = x[looked:]
    channels.fix([*x[:looked], *indices, *updates[: len(updates) - len(passed)]])
    for row, other in zip(passed, updates[len(updates) - len(passed) :], strict=True):
        channels.atoms.tie(row, other)
    channels.out(node, [*(np.zeros_like(r) for r in x[:looked]), *passed])


@rule("NonMaxSuppression")
def suppression(channels: Channels, node: Node) -> None:
    """Boxes, classes and their scores stay; the places of what is kept are plain numbers."""
    channels.fix_inputs(node)
    channels.still_outputs(node)


@rule("ScatterElements", "GatherElements")
def elements(channels: Channels, node: Node) -> None:
    """The axis that is looked up stays; along others of equal length values and indices are tied."""
    axis = int(node.attrs.get("axis", 0)) % len(channels.of(node, 0))
    out: list[AtomRow] = []
    for i, column in enumerate(zip(*(channels.of(node, k) for k in range(len(node.inputs))), strict=True)):
        passes = i != axis and len({row.size for row in column}) == 1
        for row in column if passes else ():
            channels.atoms.tie(column[0], row)
        channels.fix([] if passes else column)
        size = channels.shape(node.outputs[0])[i]
        # Any of several tied atoms represents all; the fixed one is preferred.
        out.append(np.minimum.reduce(column) if passes else still(size))
    channels.out(node, out)


@rule("Expand")
def expand(channels: Channels, node: Node) -> None:
    """Axes pass; those that are made of one index get as many as are needed."""
    x = channels.of(node, 0)
    shape = channels.shape(node.outputs[0])
    lead = len(shape) - len(x)
    rows = [x[i - lead] if i >= lead and x[i - lead].size == n else None for i, n in enumerate(shape)]
    channels.out(node, fresh_axes(channels, node.outputs[0], rows))


@rule("Tile")
def tile(channels: Channels, node: Node) -> None:
    """Rows one after the other as often as is said."""
    x, shape = channels.of(node, 0), channels.shape(node.outputs[0])
    repeats = channels.number(node, 1)
    out = []
    for i, row in enumerate(x):
        if repeats is None and row.size != shape[i]:
            channels.atoms.fix(row)
            out.append(still(shape[i]))
        else:
            out.append(row if repeats is None else np.tile(row, int(repeats[i])))
    channels.out(node, out)


@rule("Resize", "Upsample", "GridSample")
def resample(channels: Channels, node: Node) -> None:
    """Batch and channels pass, places stay."""
    x = channels.of(node, 0)
    channels.fix_inputs(node, 1)
    shape = channels.shape(node.outputs[0])
    resized = node.op == "Resize" and node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    passed = [i < 2 and not resized and row.size == n for i, (row, n) in enumerate(zip(x, shape, strict=True))]
    channels.fix([row for row, passes in zip(x, passed, strict=True) if not passes])
    channels.out(node, [row if passes else still(n) for row, n, passes in zip(x, shape, passed, strict=True)])


@rule("DepthToSpace")
def depth_to_space(channels: Channels, node: Node) -> None:
    """A channel is a block of neighbours, or the same place of every part, by mode."""
    x = channels.of(node, 0)
    times = int(node.attrs["blocksize"]) ** 2
    channels.fix(x[2:])
    crd = node.attrs.get("mode", "DCR") == "CRD"
    blocks = x[1].reshape(-1, times) if crd else x[1].reshape(times, -1).T
    channels.atoms.tie(blocks, blocks[:, :1])
    _spatial(channels, node, blocks[:, 0])


@rule("SpaceToDepth")
def space_to_depth(channels: Channels, node: Node) -> None:
    """All channels once for every place of a block."""
    x = channels.of(node, 0)
    channels.fix(x[2:])
    _spatial(channels, node, np.tile(x[1], int(node.attrs["blocksize"]) ** 2))


def _spatial(channels: Channels, node: Node, row: AtomRow) -> None:
    shape: Sequence[int] = channels.shape(node.outputs[0])
    channels.out(node, [still(shape[0]), row, *(still(n) for n in shape[2:])])
