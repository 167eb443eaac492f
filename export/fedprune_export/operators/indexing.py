"""Operators that look up or write elements by index: gathers, scatters, one-hot, the largest, triangles."""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.scattered_gradients import index_range, put_back, scatter_add, scatter_picks, scatter_rows
from fedprune_export.autodiff.tape import BATCH, Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.operators.slicing import indices_after_cut
from fedprune_export.pruning.rewrites import Sizes, rewrite


@channel_rule("Gather")
def gather_channels(channels: Channels, node: Node) -> None:
    """Constant indices select channels. A table that data indexes, and indices that repeat, keep all channels."""
    x, indices = channels.input_rows(node, 0), channels.input_rows(node, 1)
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
            middle = [channels.take(row, constant % row.size)]
    channels.set_output(node, [*x[:axis], *middle, *x[axis + 1 :]])


@channel_rule("GatherND")
def gather_nd_channels(channels: Channels, node: Node) -> None:
    """Indexed axes stay; the axes behind them pass."""
    x, indices = channels.input_rows(node, 0), channels.input_rows(node, 1)
    indexed = int(node.attrs.get("batch_dims", 0)) + channels.shape(node.inputs[1])[-1]
    channels.fix([*x[:indexed], *indices])
    channels.set_output(node, [*(np.zeros_like(r) for r in indices[:-1]), *x[indexed:]])


@channel_rule("ScatterND")
def scatter_nd_channels(channels: Channels, node: Node) -> None:
    """Indexed axes stay; the axes behind them are tied to those of the updates."""
    x, indices, updates = (channels.input_rows(node, i) for i in range(3))
    indexed = channels.shape(node.inputs[1])[-1]
    passed = x[indexed:]
    channels.fix([*x[:indexed], *indices, *updates[: len(updates) - len(passed)]])
    for row, update in zip(passed, updates[len(updates) - len(passed) :], strict=True):
        channels.atoms.tie(row, update)
    channels.set_output(node, [*(np.zeros_like(r) for r in x[:indexed]), *passed])


@channel_rule("NonMaxSuppression")
def suppression_channels(channels: Channels, node: Node) -> None:
    """Boxes, classes and scores stay; the indices of the selected boxes are plain numbers."""
    channels.fix_inputs(node)
    channels.fix_outputs(node)


@channel_rule("ScatterElements", "GatherElements")
def elements_channels(channels: Channels, node: Node) -> None:
    """The indexed axis stays; values and indices are tied along the other axes, where these are equally long."""
    axis = int(node.attrs.get("axis", 0)) % len(channels.input_rows(node, 0))
    out: list[AtomRow] = []
    for i, column in enumerate(zip(*(channels.input_rows(node, k) for k in range(len(node.inputs))), strict=True)):
        passes = i != axis and len({row.size for row in column}) == 1
        for row in column if passes else ():
            channels.atoms.tie(column[0], row)
        channels.fix([] if passes else column)
        size = channels.shape(node.outputs[0])[i]
        # Any of several tied atoms represents all; the fixed one is preferred.
        out.append(np.minimum.reduce(column) if passes else fixed_row(size))
    channels.set_output(node, out)


@channel_rule("Trilu")
def triangle_channels(channels: Channels, node: Node) -> None:
    """The axes of its matrices stay."""
    x = list(channels.input_rows(node, 0))
    channels.fix(x[-2:])
    channels.set_output(node, [*x[:-2], *(np.zeros_like(r) for r in x[-2:])])


@rewrite("Gather")
def gather_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Along an axis that is cut, replace the indices by the new ones of what is left."""
    axis = int(node.attrs.get("axis", 0)) % len(sizes.full_sizes(node.inputs[0]))
    constant = graph.initializers.get(node.inputs[1])
    if constant is None or not sizes.is_shorter(node.inputs[0], axis):
        return
    old_indices = constant % (sizes.full_sizes(node.inputs[0])[axis] or 1)
    if constant.ndim == 1:
        node.inputs[1] = graph.ints(*indices_after_cut(sizes, node, old_indices, axis, axis).tolist())
    else:
        (position,) = np.flatnonzero(sizes.kept_indices(node.inputs[0], axis) == old_indices)
        node.inputs[1] = graph.constant(int(position), np.int64)


@gradient_rule("ScatterND", "ScatterElements")
def scatter_updates(tape: Tape, node: Node) -> Pull:
    """Updates replace or are added to elements. They get dy of these; the data gets the rest of dy, or all if added."""
    data, index, updates = node.inputs
    x, indices, new = (tape.value(n) for n in node.inputs)
    reduction = str(node.attrs.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise ModelError(f"{describe(node)}: how it scatters", expected=["none", "add"], got=reduction)
    if node.op == "ScatterElements":
        axis = int(node.attrs.get("axis", 0)) % len(tape.shape(data))
        # Indices are absolute, so the axis must have one size at every width.
        tape.static(node, [tape.shape(data)[axis]])
        attrs = {"axis": axis}
    else:
        depth = tape.shape(index)[-1]
        indexed = tape.shape(data)[: depth if isinstance(depth, int) else 0]
        tape.static(node, [depth, *(d for d in indexed if d != BATCH)])
        attrs = {}
    g = tape.graph
    tape.enter(node.outputs[0], g.emit(node.op, x, indices, new, attrs=node.attrs), tape.shape(data))

    def pull(dy: str) -> None:
        if tape.needs_gradient(data):
            # Data that was overwritten has no influence on the output.
            zeros = g.emit("ConstantOfShape", tape.shape_of(new))
            tape.add_gradient(data, dy if reduction == "add" else g.emit(node.op, dy, indices, zeros, attrs=attrs))
        if tape.needs_gradient(updates):
            read = "GatherElements" if node.op == "ScatterElements" else "GatherND"
            tape.add_gradient(updates, g.emit(read, dy, indices, attrs=attrs))

    return pull


@gradient_rule("Trilu")
def triangle(tape: Tape, node: Node) -> Pull:
    """A triangle of each matrix, zeros elsewhere; dy in the same triangle."""
    name, g = node.inputs[0], tape.graph
    offset = [tape.value(i) for i in node.inputs[1:] if i]
    tape.enter(node.outputs[0], g.emit("Trilu", tape.value(name), *offset, attrs=node.attrs), tape.shape(name))
    return lambda dy: tape.add_gradient(name, g.emit("Trilu", dy, *offset, attrs=node.attrs))


@gradient_rule("OneHot")
def one_hot(tape: Tape, node: Node) -> None:
    """A vector per index: no gradient passes."""
    name = node.inputs[0]
    depth = tape.required_constant(node, 1)
    if depth is None:
        raise ModelError(f"{describe(node)}: no depth")
    shape = tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % (len(shape) + 1)
    y = tape.graph.emit("OneHot", *[tape.value(i) for i in node.inputs], attrs={"axis": axis})
    tape.enter(node.outputs[0], y, (*shape[:axis], int(depth.reshape(-1)[0]), *shape[axis:]))


@gradient_rule("Gather")
def gather(tape: Tape, node: Node) -> Pull:
    """Rows by constant indices, or an embedding by data; the gradients of equal indices add up."""
    name, g = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    constant, size = tape.constant(node, 1), tape.extent(shape[axis])
    picked = np.empty(0, np.int64) if constant is None else np.where(constant < 0, constant + size, constant)
    if constant is None:
        tape.static(node, [shape[axis]])
        # The indices are data: which rows are read is known only at run time.
        indices, index_shape = tape.value(node.inputs[1]), tape.shape(node.inputs[1])
    elif isinstance(shape[axis], int):
        indices, index_shape = g.constant(picked, np.int64), picked.shape
    else:
        return _gather_runs(tape, node, axis, picked)
    out = (*shape[:axis], *index_shape, *shape[axis + 1 :])
    tape.enter(node.outputs[0], g.emit("Gather", x, indices, attrs={"axis": axis}), out)

    def pull(dy: str) -> None:
        if constant is None:
            targets = g.emit("Unsqueeze", indices, g.ints(-1))
            tape.add_gradient(name, scatter_rows(tape, dy, shape, axis, targets, len(index_shape)))
            return
        flat = (*shape[:axis], picked.size, *shape[axis + 1 :])
        dy = g.emit("Unsqueeze", dy, g.ints(axis)) if picked.ndim == 0 else tape.reshape(dy, out, flat)
        tape.add_gradient(name, scatter_picks(tape, dy, flat, axis, picked.reshape(-1), size))

    return pull


def _gather_runs(tape: Tape, node: Node, axis: int, picked: Array) -> Pull:
    """Reordered runs of channels, and fixed indices among channels: concatenated slices."""
    name, g = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    runs = _index_runs(tape, node, axis, picked.reshape(-1).tolist())
    axis_name = g.ints(axis)
    slices = [g.emit("Slice", x, tape.size(begin), tape.size(stop), axis_name) for begin, stop in runs]
    lengths = [tape.difference(stop, begin) for begin, stop in runs]
    y = g.emit("Concat", *slices, attrs={"axis": axis}) if len(slices) > 1 else slices[0]
    out: Shape = (*shape[:axis], tape.total(lengths), *shape[axis + 1 :])
    if picked.ndim == 0:
        y, out = g.emit("Squeeze", y, axis_name), (*shape[:axis], *shape[axis + 1 :])
    elif picked.ndim > 1:
        raise ModelError(f"{describe(node)}: indices into channels", expected="a vector", got=picked.shape)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        dy = g.emit("Unsqueeze", dy, axis_name) if picked.ndim == 0 else dy
        slice_gradients = [dy]
        if len(runs) > 1:
            slice_gradients = g.emit_many("Split", dy, tape.sizes(lengths), outputs=len(runs), attrs={"axis": axis})
        for gradient, (begin, stop) in zip(slice_gradients, runs, strict=True):
            tape.add_gradient(name, put_back(tape, gradient, shape, [(axis, begin, stop)]))

    return pull


def _index_runs(tape: Tape, node: Node, axis: int, picked: list[int]) -> list[tuple[Dim, Dim]]:
    """Indices as runs whose bounds lie between channel groups, so that they hold at every width."""
    name = node.inputs[0]
    out: list[tuple[Dim, Dim]] = []
    start = 0
    while start < len(picked):
        length = 1
        while start + length < len(picked) and picked[start + length] == picked[start] + length:
            length += 1
        begin, stop = tape.kept_prefix(name, axis, picked[start]), None
        # A run may end within a channel group; it is shortened until it ends between two.
        while length and (stop := tape.kept_prefix(name, axis, picked[start] + length)) is None:
            length -= 1
        if begin is None or stop is None:
            raise ModelError(
                f"{describe(node)} picks single channels", expected="whole channel groups", got=f"index {picked[start]}"
            )
        out.append((begin, stop))
        start += length
    return out


@gradient_rule("GatherElements")
def gather_elements(tape: Tape, node: Node) -> Pull:
    """One element per index along a fixed axis; the gradients of equal indices add up."""
    name, index = node.inputs
    x, shape, indices = tape.value(name), tape.shape(name), tape.value(index)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    tape.static(node, [shape[axis]])
    g = tape.graph
    y = g.emit("GatherElements", x, indices, attrs={"axis": axis})
    tape.enter(node.outputs[0], y, tape.shape(index))
    return lambda dy: tape.add_gradient(name, scatter_add(tape, x, indices, dy, axis))


@gradient_rule("GatherND")
def gather_nd(tape: Tape, node: Node) -> Pull:
    """Slices by tuples of indices into the leading axes; the gradients of equal tuples add up."""
    name, index = node.inputs
    x, shape, indices = tape.value(name), tape.shape(name), tape.value(index)
    index_shape = tape.shape(index)
    batches = int(node.attrs.get("batch_dims", 0))
    depth = index_shape[-1]
    if not isinstance(depth, int):
        raise ModelError(f"{describe(node)}: length of an index", expected="a number", got=depth)
    tape.static(node, [d for d in shape[batches : batches + depth] if d != BATCH])
    g = tape.graph
    out = (*index_shape[:-1], *shape[batches + depth :])
    tape.enter(node.outputs[0], g.emit("GatherND", x, indices, attrs={"batch_dims": batches}), out)

    def pull(dy: str) -> None:
        full_indices = indices
        for axis in reversed(range(batches)):
            # Scattering has no batch axes: an index includes its position on them, too.
            numbers = index_range(tape, shape[axis])
            ones = [1] * len(index_shape)
            ones[axis] = -1
            column = g.emit("Reshape", numbers, g.ints(*ones))
            head = tape.sizes([*index_shape[:-1], 1])
            full_indices = g.emit("Concat", g.emit("Expand", column, head), full_indices, attrs={"axis": -1})
        zeros = g.emit("ConstantOfShape", tape.shape_of(x))
        tape.add_gradient(name, g.emit("ScatterND", zeros, full_indices, dy, attrs={"reduction": "add"}))

    return pull


_KEPT_BOXES_EXTENT = 100_003  # stands for how many boxes are kept: a prime, which no other size is by chance


@gradient_rule("NonMaxSuppression")
def suppression(tape: Tape, node: Node) -> None:
    """The indices of the selected boxes: no gradient passes."""
    inputs = [tape.value(i) if i else "" for i in node.inputs]
    box_count = tape.symbol(node.outputs[0], _KEPT_BOXES_EXTENT)
    tape.enter(node.outputs[0], tape.graph.emit("NonMaxSuppression", *inputs, attrs=node.attrs), (box_count, 3))
