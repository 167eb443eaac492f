"""Reshape, Flatten, Squeeze and Unsqueeze: axes are split into factors, and factors are merged into axes.

Atoms are explained in `channels.atoms`, runs and factors in `channels.factors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.factors import AxisRun, assignments, axis_runs, extents, factor_run
from fedprune_export.channels.rule import SHAPE_INPUTS, Channels, Rows, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import BATCH_EXTENT, TRACE_BATCHES
from fedprune_export.pruning.rewrites import Sizes, rewrite


@channel_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape_channels(channels: Channels, node: Node) -> None:
    """Find which new axis the channels (atoms) of each old axis end up on, as `channels.factors` splits the axes."""
    x, target = channels.input_rows(node, 0), channels.shape(node.outputs[0])
    out: list[AtomRow] = [fixed_row(n) for n in target]
    if any(row.any() for row in x):
        old, new = extents(channels.trace, node.inputs[0]), extents(channels.trace, node.outputs[0])
        free = [d is None for d in channels.trace.dims(node.outputs[0])]
        if old is None or new is None:
            _fix_mixed_channels(channels, node, x)
        else:
            for olds, news in axis_runs(old, new):
                _carry_atoms(channels, node, x, out, factor_run(olds, news, old, new), olds, free)
    channels.set_output(node, out)


def _carry_atoms(
    channels: Channels,
    node: Node,
    x: Rows,
    out: list[AtomRow],
    run: AxisRun | None,
    olds: list[int],
    free: Sequence[bool],
) -> None:
    """Carry the atoms of a run's old axes to its new ones."""
    if not any(x[i].any() for i in olds):
        return
    if run is None:
        _fix_mixed_channels(channels, node, [x[i] for i in olds])
        return
    # The factors' sizes in the traced arrays: multiples of `BATCH_EXTENT` stand for multiples of the batch.
    sizes = [f // BATCH_EXTENT * TRACE_BATCHES[0] if f % BATCH_EXTENT == 0 else f for f in run.factors]
    grids = [x[i].reshape([sizes[f] for f in span]) for i, span in zip(run.old_axes, run.old_factors, strict=True)]
    options = assignments(run, grids, free)
    if len(options) > 1:
        # Several options: only channels that can still be cut decide between them.
        unit = channels.atoms.units()
        grids = [unit[g] for g in grids]
        options = assignments(run, grids, free)
    if not options:
        _fix_mixed_channels(channels, node, grids)
        return
    key = f"{node.outputs[0]}:{run.old_axes[0]}"
    option = options[0] if len(options) == 1 else channels.choices.next_option(key, options)
    if option is None:
        if channels.follows_data(node):
            _fix_mixed_channels(channels, node, grids)
        channels.fix([g.reshape(-1) for g in grids])
        return
    carried_rows = []
    for grid, span, to in zip(grids, run.old_factors, option, strict=True):
        if to is None:
            channels.atoms.fix(grid.reshape(-1))
            continue
        target = run.new_factors[run.new_axes.index(to)]
        # The atoms go to one new axis. Factors of the old axis that this axis lacks can't tell atoms apart any more, so
        # atoms that differ only along them are tied: kept or cut together.
        dropped = tuple(axis for axis, f in enumerate(span) if f not in target)
        reduced = grid
        for axis in dropped:
            reduced = reduced.take([0], axis=axis)
        channels.atoms.tie(grid, reduced)
        view = [grid.shape[f - span.start] if f in span else 1 for f in target]
        row = np.broadcast_to(reduced.reshape(view), [sizes[f] for f in target]).reshape(-1)
        out[to] = row
        carried_rows.append(row)
    if len(options) > 1:
        channels.choices.watch(key, option, carried_rows)


def _fix_mixed_channels(channels: Channels, node: Node, rows: Sequence[AtomRow]) -> None:
    unit = channels.atoms.units()
    if any(unit[row].any() for row in rows):
        channels.notes.append(f"{node.op} {node.name} mixes channels with other axes: they stay.")
    channels.fix([row.reshape(-1) for row in rows])


@rewrite(*SHAPE_INPUTS)
def target_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Write a target shape for the new widths: fixed sizes as numbers, one entry that depends on the batch as −1.

    Further entries that depend on the batch are read from the target as it was.
    """
    index = SHAPE_INPUTS[node.op]
    if len(node.inputs) <= index or not node.inputs[index]:
        return
    before, after = sizes.full_sizes(node.outputs[0]), sizes.cut_sizes(node.outputs[0])
    if before == after:
        return

    batch_axes = [i for i, n in enumerate(after) if n is None]
    if len(batch_axes) <= 1 and node.op == "Reshape":
        node.inputs[index] = graph.ints(*(-1 if n is None else n for n in after))
        return
    old_target = node.inputs[index]
    # An expansion's target may be shorter than its output: it is aligned at the end.
    constant = graph.initializers.get(old_target)
    lead = len(after) - (constant.size if constant is not None else sizes.full_sizes(old_target)[0] or 0)
    if not batch_axes:
        node.inputs[index] = graph.ints(*(n or 0 for n in after[lead:]))
        return
    entries = [
        graph.ints(n) if n is not None else graph.emit("Gather", old_target, graph.ints(i), attrs={"axis": 0})
        for i, n in enumerate(after[lead:])
    ]
    node.inputs[index] = graph.emit("Concat", *entries, attrs={"axis": 0})


@gradient_rule("Flatten")
def flatten(tape: Tape, node: Node) -> Pull:
    """Merge the axes before `axis` into one, and those from it on into another."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    out = (tape.product(shape[:axis]), tape.product(shape[axis:]))
    tape.enter(node.outputs[0], tape.graph.emit("Flatten", x, attrs={"axis": axis}), out)
    return lambda dy: tape.add_gradient(name, tape.reshape(dy, out, shape))


@gradient_rule("Reshape")
def reshape(tape: Tape, node: Node) -> Pull:
    """Any reshape; sizes that vary are computed at run time where 0 and -1 can't express them."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    analysed = tape.analysed_shape(node.outputs[0])
    if analysed is not None:
        out = _fill_batch_axes(tape, node, analysed, shape)
    else:
        target = tape.target_shape(node, 1)
        if target is None:
            raise ModelError(f"{describe(node)}: no target shape")
        out = symbolic_target(tape, node, shape, [int(t) for t in target.reshape(-1)])
    if any(d == 0 for d in out):
        raise ModelError(f"{describe(node)}: an empty dimension", got=list(out))
    if tape.product(out) != tape.product(shape):
        raise ModelError(f"{describe(node)} splits a dimension whose size varies", got=f"{list(shape)} to {list(out)}")
    tape.enter(node.outputs[0], tape.reshape(x, shape, out), out)
    return lambda dy: tape.add_gradient(name, tape.reshape(dy, out, shape))


def _fill_batch_axes(tape: Tape, node: Node, analysed: Sequence[Dim | None], shape: Shape) -> Shape:
    """The analysed shape of a reshape's output with the axes that follow the batch filled in."""
    batch_axes = [i for i, d in enumerate(analysed) if d is None]
    if not batch_axes:
        return tuple(d for d in analysed if d is not None)
    if len(batch_axes) == 1:
        rest = tape.quotient(tape.product(shape), tape.product([d for d in analysed if d is not None]))
        if rest is None:
            raise ModelError(
                f"{describe(node)} splits a dimension whose size varies", got=f"{list(shape)} to {list(analysed)}"
            )
        return tuple(rest if d is None else d for d in analysed)
    traced_shape = tape.traced_shape(node.outputs[0])
    return tuple(t if d is None else d for d, t in zip(analysed, traced_shape, strict=True))


def symbolic_target(tape: Tape, node: Node, shape: Shape, target: Sequence[int]) -> Shape:
    """The symbolic shape that a reshape of `shape` to `target` (at full width, with 0 and -1) gives.

    Raises `ModelError` if a channel or batch dimension would be split.
    """
    sizes = [tape.extent(d) for d in shape]
    target_sizes = list(target)
    if int(node.attrs.get("allowzero", 0)) == 0:
        target_sizes = [sizes[i] if t == 0 else t for i, t in enumerate(target)]
    rest = math.prod(w for w in target_sizes if w != -1)
    target_sizes = [math.prod(sizes) // rest if w == -1 else w for w in target_sizes]
    if math.prod(target_sizes) != math.prod(sizes):
        raise ModelError(f"{describe(node)}: shapes don't fit", expected=list(shape), got=list(target))
    out: list[Dim] = []
    for olds, news in axis_runs(sizes, target_sizes):
        block, new_sizes, requested = (
            [shape[i] for i in olds],
            [target_sizes[j] for j in news],
            [target[j] for j in news],
        )
        large = [d for d in block if d != 1]
        if len(news) == 1:
            out.append(tape.product(block))
        elif all(isinstance(d, int) for d in block):
            out.extend(new_sizes)
        elif (rest_of_block := _inferred_size(tape, block, requested)) is not None:
            out.extend(rest_of_block if t == -1 else w for t, w in zip(requested, new_sizes, strict=True))
        elif len(large) == 1 and [w for w in new_sizes if w != 1] == [tape.extent(large[0])]:
            # Ones around a whole dimension (C -> 1, C, 1) leave it whole.
            out.extend(large[0] if w != 1 else 1 for w in new_sizes)
        else:
            raise ModelError(
                f"{describe(node)} splits a dimension whose size varies",
                got=f"{list(shape)} to {list(target)}",
                hint="A training graph for all widths can't do that.",
            )
    return tuple(out)


def _inferred_size(tape: Tape, block: Sequence[Dim], target: Sequence[int]) -> Dim | None:
    """The size that −1 stands for, if the other sizes divide a block at every width; else None."""
    other_sizes = [t for t in target if t != -1]
    if len(other_sizes) != len(target) - 1 or 0 in other_sizes:
        return None
    return tape.quotient(tape.product(block), tape.product(other_sizes))


def _axes(tape: Tape, node: Node) -> list[int]:
    """Axes of Squeeze and Unsqueeze: an input since opset 13, an attribute before."""
    values = tape.required_constant(node, 1)
    raw = node.attrs.get("axes", []) if values is None else values.reshape(-1)
    return [int(a) for a in raw]


@gradient_rule("Squeeze")
def squeeze(tape: Tape, node: Node) -> Pull:
    """Remove axes of size 1."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axes = [a % len(shape) for a in _axes(tape, node)] or [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise ModelError(f"{describe(node)}: an axis isn't 1", got=list(shape))
    out = tuple(d for i, d in enumerate(shape) if i not in axes)
    tape.enter(node.outputs[0], tape.graph.emit("Squeeze", x, tape.graph.ints(*axes)), out)
    return lambda dy: tape.add_gradient(name, tape.graph.emit("Unsqueeze", dy, tape.graph.ints(*axes)))


@gradient_rule("Unsqueeze")
def unsqueeze(tape: Tape, node: Node) -> Pull:
    """Insert axes of size 1."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axes = _axes(tape, node)
    rank = len(shape) + len(axes)
    axes = sorted(a % rank for a in axes)
    rest = iter(shape)
    out: Shape = tuple(1 if i in axes else next(rest) for i in range(rank))
    tape.enter(node.outputs[0], tape.graph.emit("Unsqueeze", x, tape.graph.ints(*axes)), out)
    return lambda dy: tape.add_gradient(name, tape.graph.emit("Squeeze", dy, tape.graph.ints(*axes)))
