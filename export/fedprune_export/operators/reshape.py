"""Reshape, Flatten, Squeeze and Unsqueeze: operators that give the same elements other axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.factors import Assignment, AxisRun, assignments, axis_runs, extents, factor_run
from fedprune_export.channels.rule import SHAPE_INPUTS, Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.trace import BATCH_EXTENT, TRACE_BATCHES
from fedprune_export.pruning.rewrites import Sizes, rewrite


@channel_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape_channels(channels: Channels, node: Node) -> None:
    """Find which new axis the channels of each old axis end up on."""
    x, target = channels.input_rows(node, 0), channels.shape(node.outputs[0])
    out: dict[int, AtomRow] = {}
    if any(row.any() for row in x):
        old, new = extents(channels.trace, node.inputs[0]), extents(channels.trace, node.outputs[0])
        if old is None or new is None:
            fix_mixed_channels(channels, node, x)
        else:
            for old_axes, new_axes in axis_runs(old, new):
                rows = [x[i] for i in old_axes]
                out.update(carry_rows(channels, node, rows, factor_run(old_axes, new_axes, old, new)))
    channels.set_output(node, [out.get(i, fixed_row(n)) for i, n in enumerate(target)])


@rewrite(*SHAPE_INPUTS)
def target_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Write a target shape for the new widths: fixed sizes as numbers, one entry that depends on the batch as −1.

    Further entries that depend on the batch are read from the target as it was.
    """
    index = SHAPE_INPUTS[node.op]
    if len(node.inputs) <= index or not node.inputs[index]:
        return
    before, after = sizes.full_sizes(node.outputs[0]), sizes.cut_sizes(node.outputs[0])
    # The target may be the shape of another value, which has become narrower than what it gives the size to.
    if before == after and not _follows_cut_value(graph, node.inputs[index], sizes):
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


def _follows_cut_value(graph: Graph, target: str, sizes: Sizes) -> bool:
    """Whether a target is computed from the size of a value with fewer channels."""
    makers = graph.producers() if target not in graph.initializers else {}
    pending, visited = [target], set[str]()
    while pending:
        name = pending.pop()
        maker = makers.get(name)
        if maker is None or name in visited:
            continue
        visited.add(name)
        if maker.op not in SIZE_OPERATORS:
            pending += maker.inputs
        elif sizes.full_sizes(maker.inputs[0]) != sizes.cut_sizes(maker.inputs[0]):
            return True
    return False


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
    out, total, analysed = tape.output_shape(node), tape.product(shape), tape.analysed_shape(node.outputs[0])
    if tape.product(out) != total and 0 not in out:
        # A trace tells sizes a · N + b at full width. One that follows widths, too, or is N · N, is what others leave.
        unknown = [i for i in range(len(out)) if analysed is None or analysed[i] is None]
        rests = [(i, tape.quotient(total, tape.product([*out[:i], *out[i + 1 :]]))) for i in unknown]
        out = next(((*out[:i], rest, *out[i + 1 :]) for i, rest in rests if rest is not None), out)
    if tape.product(out) != total:
        raise ModelError(
            f"{describe(node)} splits a dimension whose size varies",
            got=f"{list(shape)} to {list(analysed or out)}",
            hint="A training graph for all widths can't do that.",
        )
    tape.enter(node.outputs[0], tape.reshape(x, shape, out), out)
    return lambda dy: tape.add_gradient(name, tape.reshape(dy, out, shape))


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


# An *atom* is an integer that names an index of an axis. `channels.factors` splits runs of axes into *factors* (sizes
# whose products are the axes' sizes, before and after) and lists the assignments of old axes to new axes. Where several
# are possible, one is chosen, and tried again with another if it leaves nothing to cut (`channels.choices`).
def carry_rows(channels: Channels, node: Node, rows: Sequence[AtomRow], run: AxisRun | None) -> dict[int, AtomRow]:
    """Carry the atoms of a run's old axes to its new axes. Returns the rows of those that get atoms.

    `rows`: the atoms of the run's old axes; `run`: none for axes without common factors: their channels stay.
    """
    if not any(row.any() for row in rows):
        return {}
    if run is None:
        fix_mixed_channels(channels, node, rows)
        return {}
    # The factors' sizes in the traced arrays: multiples of `BATCH_EXTENT` stand for multiples of the batch.
    sizes = [f // BATCH_EXTENT * TRACE_BATCHES[0] if f % BATCH_EXTENT == 0 else f for f in run.factors]
    grids = [row.reshape([sizes[f] for f in span]) for row, span in zip(rows, run.old_factors, strict=True)]
    free = [d is None for d in channels.trace.dims(node.outputs[0])]
    options = assignments(run, grids, free)
    if len(options) > 1:
        # Several options: only channels that can still be cut decide between them.
        unit = channels.atoms.units()
        grids = [unit[g] for g in grids]
        options = assignments(run, grids, free)
    if not options:
        fix_mixed_channels(channels, node, grids)
        return {}
    key = f"{node.outputs[0]}:{run.old_axes[0]}"
    option = options[0] if len(options) == 1 else channels.choices.next_option(key, options)
    if option is None:
        if None in channels.trace.dims(node.outputs[0]):
            fix_mixed_channels(channels, node, grids)
        channels.fix([g.reshape(-1) for g in grids])
        return {}
    carried_rows = _assign_rows(channels, run, grids, option, sizes)
    if len(options) > 1:
        channels.choices.expect_choice(key, option, list(carried_rows.values()))
    return carried_rows


def _assign_rows(
    channels: Channels, run: AxisRun, grids: Sequence[AtomRow], option: Assignment, sizes: Sequence[int]
) -> dict[int, AtomRow]:
    """The rows of the new axes that take the atoms of old axes by this assignment.

    `grids`: atoms of the old axes, one axis per factor; `sizes`: of the run's factors.
    """
    rows: dict[int, AtomRow] = {}
    for grid, span, new_axis in zip(grids, run.old_factors, option, strict=True):
        if new_axis is None:
            channels.atoms.fix(grid.reshape(-1))
            continue
        target = run.new_factors[run.new_axes.index(new_axis)]
        # Factors of the old axis that the new axis lacks can't tell atoms apart any more, so atoms that differ only
        # along them are tied: kept or cut together.
        reduced = grid
        for axis, factor in enumerate(span):
            if factor not in target:
                reduced = reduced.take([0], axis=axis)
        channels.atoms.tie(grid, reduced)
        view = [grid.shape[f - span.start] if f in span else 1 for f in target]
        rows[new_axis] = np.broadcast_to(reduced.reshape(view), [sizes[f] for f in target]).reshape(-1)
    return rows


def fix_mixed_channels(channels: Channels, node: Node, rows: Sequence[AtomRow]) -> None:
    """Let channels stay that a reshape spreads over several axes or mixes with other ones, with a note."""
    unit = channels.atoms.units()
    if any(unit[row].any() for row in rows):
        channels.notes.append(f"{node.op} {node.name} mixes channels with other axes: they stay.")
    channels.fix([row.reshape(-1) for row in rows])
