"""Operators that move or repeat elements (Transpose, Concat, Split, Expand, Tile), or measure or take sizes (Shape)."""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.rewrites import Sizes, rewrite


@channel_rule("Concat")
def concat_channels(channels: Channels, node: Node) -> None:
    """Concatenate the atoms along the axis, and tie the other axes."""
    inputs = [channels.rows[name] for name in node.inputs]
    axis = int(node.attrs["axis"]) % len(inputs[0])
    out = list(inputs[0])
    for rows in inputs[1:]:
        for i, row in enumerate(rows):
            if i != axis:
                channels.atoms.tie(out[i], row)
                out[i] = np.minimum(out[i], row)
    out[axis] = np.concatenate([p[axis] for p in inputs])
    channels.set_output(node, out)


@channel_rule("Split")
def split_channels(channels: Channels, node: Node) -> None:
    """Split the atoms along the axis."""
    x = list(channels.input_rows(node, 0))
    axis = int(node.attrs.get("axis", 0)) % len(x)
    sizes = [channels.shape(name)[axis] if name else 0 for name in node.outputs]
    if channels.trace.dims(node.inputs[0])[axis] is None or sum(sizes) != x[axis].size:
        channels.fix([x[axis]])
        for i, n in enumerate(sizes):
            channels.set_output(node, [*x[:axis], fixed_row(n), *x[axis + 1 :]], i)
        return
    for i, indices in enumerate(np.split(np.arange(x[axis].size), np.cumsum(sizes)[:-1])):
        channels.set_output(node, [*x[:axis], channels.take(x[axis], indices), *x[axis + 1 :]], i)


@channel_rule("Transpose")
def transpose_channels(channels: Channels, node: Node) -> None:
    """Permute the axes."""
    x = channels.input_rows(node, 0)
    order = node.attrs.get("perm") or list(range(len(x)))[::-1]
    channels.set_output(node, [x[i] for i in order])


@channel_rule("Expand")
def expand_channels(channels: Channels, node: Node) -> None:
    """Axes pass; those that are repeated from one index get channels of their own."""
    x = channels.input_rows(node, 0)
    shape = channels.shape(node.outputs[0])
    lead = len(shape) - len(x)
    rows = [x[i - lead] if i >= lead and x[i - lead].size == n else None for i, n in enumerate(shape)]
    channels.set_output(node, fresh_axes(channels, node.outputs[0], rows))


@channel_rule("Tile")
def tile_channels(channels: Channels, node: Node) -> None:
    """Repeat the atoms along each axis; they stay where the repetitions are unknown."""
    x, shape = channels.input_rows(node, 0), channels.shape(node.outputs[0])
    repeats = channels.constant_input(node, 1)
    out = []
    for i, row in enumerate(x):
        if repeats is None and row.size != shape[i]:
            channels.atoms.fix(row)
            out.append(fixed_row(shape[i]))
        else:
            out.append(row if repeats is None else np.tile(row, int(repeats[i])))
    channels.set_output(node, out)


@channel_rule("Shape", "Size", "Range")
def size_channels(channels: Channels, node: Node) -> None:
    """Sizes are not channels: the inputs may be cut, the outputs are plain numbers."""
    channels.fix_outputs(node)


@channel_rule("ConstantOfShape")
def constant_of_shape_channels(channels: Channels, node: Node) -> None:
    """Every index holds the same number, so the axes get channels of their own."""
    name = node.outputs[0]
    channels.set_output(node, fresh_axes(channels, name, [None] * len(channels.shape(name))))


def fresh_axes(channels: Channels, name: str, rows: list[AtomRow | None]) -> list[AtomRow]:
    """Rows of a value: new atoms for an axis without a row, unless it follows the batch."""
    # An axis along which numbers are repeated ties nothing yet: its readers decide which channels it has.
    shape, dims = channels.shape(name), channels.trace.dims(name)
    return [
        row if row is not None else (channels.atoms.fresh(n) if dim is not None else fixed_row(n))
        for row, n, dim in zip(rows, shape, dims, strict=True)
    ]


@rewrite("Split")
def split_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Set the lengths of the parts to what is left of each."""
    axis = int(node.attrs.get("axis", 0))
    if sizes.is_shorter(node.inputs[0], axis):
        lengths = [sizes.cut_sizes(name)[axis] if name else None for name in node.outputs]
        # Without a name the length of a part after the cut is unknown.
        if None in lengths:
            raise ModelError(f"Split {node.name} has a part without a name")
        node.inputs[1:] = [graph.ints(*(n or 0 for n in lengths))]
        node.attrs.pop("num_outputs", None)


@gradient_rule("Transpose")
def transpose(tape: Tape, node: Node) -> Pull:
    """A permutation of axes; the gradient takes the inverse one."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    perm = [int(p) for p in node.attrs.get("perm", range(len(shape))[::-1])]
    back = [perm.index(i) for i in range(len(perm))]
    out = tuple(shape[p] for p in perm)
    tape.enter(node.outputs[0], tape.graph.emit("Transpose", x, attrs={"perm": perm}), out)
    return lambda dy: tape.add_gradient(name, tape.graph.emit("Transpose", dy, attrs={"perm": back}))


@gradient_rule("Expand")
def expand(tape: Tape, node: Node) -> Pull:
    """Repeat a value along axes of 1; the gradient is summed over them."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    target_sizes = tape.output_shape(node)
    padded = (1,) * (len(target_sizes) - len(shape)) + shape
    out = tuple(d if size == 1 else size for size, d in zip(padded, target_sizes, strict=True))
    # An axis that isn't repeated keeps its size whatever the target is, if that is 1.
    target = tape.sizes([1 if d == p else d for d, p in zip(out, padded, strict=True)])
    tape.enter(node.outputs[0], tape.graph.emit("Expand", x, target), out)
    return lambda dy: tape.add_gradient(name, tape.sum_to_shape(dy, out, shape))


@gradient_rule("ConstantOfShape")
def constant_of_shape(tape: Tape, node: Node) -> None:
    """Equal numbers in a computed shape: no gradient passes."""
    out = tape.output_shape(node)
    y = tape.graph.emit("ConstantOfShape", tape.sizes(out), attrs=node.attrs)
    tape.enter(node.outputs[0], y, out)


@gradient_rule("Tile")
def tile(tape: Tape, node: Node) -> Pull:
    """Repeat a value along axes; the gradient is summed over the repetitions."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    repeats = tape.size_input(node, 1) or ()
    out = tuple(tape.product([r, d]) for r, d in zip(repeats, shape, strict=True))
    g = tape.graph
    tape.enter(node.outputs[0], g.emit("Tile", x, tape.sizes(repeats)), out)

    def pull(dy: str) -> None:
        apart: list[Dim] = []
        axes = []
        for r, d in zip(repeats, shape, strict=True):
            if r != 1:
                axes.append(len(apart))
                apart.append(r)
            apart.append(d)
        if not axes:
            tape.add_gradient(name, dy)
            return
        by_repeat = tape.reshape(dy, out, tuple(apart))
        tape.add_gradient(name, g.emit("ReduceSum", by_repeat, g.ints(*axes), attrs={"keepdims": 0}))

    return pull


@gradient_rule("Concat")
def concat(tape: Tape, node: Node) -> Pull:
    """Concatenate pieces. The gradient is split where they meet, at run time where widths vary."""
    shapes = [tape.shape(i) for i in node.inputs]
    values = [tape.value(i) for i in node.inputs]
    axis = int(node.attrs["axis"]) % len(shapes[0])
    g = tape.graph
    out = list(shapes[0])
    out[axis] = tape.total([s[axis] for s in shapes])
    for i in range(len(out)):
        if i != axis and len({s[i] for s in shapes}) > 1:
            sizes = [s[i] for s in shapes]
            raise ModelError(f"{describe(node)}: sizes don't fit each other at every width", got=sizes)
    tape.enter(node.outputs[0], g.emit("Concat", *values, attrs={"axis": axis}), tuple(out))

    def pull(dy: str) -> None:
        lengths = tape.sizes([s[axis] for s in shapes])
        gradients = g.emit_many("Split", dy, lengths, outputs=len(values), attrs={"axis": axis})
        for name, gradient in zip(node.inputs, gradients, strict=True):
            if tape.needs_gradient(name):
                tape.add_gradient(name, gradient)

    return pull


@gradient_rule("Split")
def split_axis(tape: Tape, node: Node) -> Pull:
    """Split a value, also along channels. The gradient joins those of the pieces, with zeros for unread ones."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    lengths = _piece_lengths(tape, node, shape[axis], axis)
    if tape.total(lengths) != shape[axis]:
        raise ModelError(f"{describe(node)}: its pieces don't make up the whole", expected=shape[axis], got=lengths)
    g = tape.graph
    values = g.emit_many("Split", x, tape.sizes(lengths), outputs=len(lengths), attrs={"axis": axis})
    for output, value, length in zip(node.outputs, values, lengths, strict=True):
        if output:
            tape.enter(output, value, (*shape[:axis], length, *shape[axis + 1 :]))

    def pull(*gradients: str | None) -> None:
        pieces = [dy or g.emit("ConstantOfShape", tape.shape_of(v)) for dy, v in zip(gradients, values, strict=True)]
        tape.add_gradient(name, g.emit("Concat", *pieces, attrs={"axis": axis}))

    return pull


def _piece_lengths(tape: Tape, node: Node, total: Dim, axis: int) -> list[Dim]:
    """The lengths of the pieces of a split."""
    count, full = len(node.outputs), tape.extent(total)
    requested = tape.required_constant(node, 1)
    if requested is None:
        requested = np.full(count, -(-full // count))
        # The last piece takes what is left, as in ONNX.
        requested[-1] = full - requested[:-1].sum()
    ends = [tape.kept_prefix(node.inputs[0], axis, int(n)) for n in np.cumsum(requested)]
    out: list[Dim] = []
    before: Dim = 0
    for end in ends:
        if end is None:
            raise ModelError(f"{describe(node)} cuts a run of channels", got=f"{requested.tolist()} of {total}")
        out.append(tape.difference(end, before))
        before = end
    return out
