"""Slice: ranges of indices along some axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED
from fedprune_export.autodiff.scattered_gradients import put_back, scatter_picks
from fedprune_export.autodiff.tape import Dim, Pull, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.pruning.rewrites import Sizes, rewrite


def constant_slices(graph: Graph, node: Node, rank: int) -> dict[int, slice] | None:
    """The indices that a Slice takes along each of its axes; None where that isn't constant."""
    constants = [graph.initializers.get(name) if name else None for name in node.inputs[1:]]
    if any(name and c is None for name, c in zip(node.inputs[1:], constants, strict=True)):
        return None
    return _slices(constants, rank)


def _slices(inputs: Sequence[Array | None], rank: int) -> dict[int, slice]:
    """The indices along each axis, from the inputs that say where they start and end, their axes and steps."""
    starts, ends, axes, steps = (None if i is None else i.reshape(-1) for i in [*inputs, *[None] * 4][:4])
    if starts is None or ends is None:
        return {}
    out = {}
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        axis, step = i if axes is None else int(axes[i]) % rank, 1 if steps is None else int(steps[i])
        # Backwards, an end at the very bottom means that index 0 is included.
        out[axis] = slice(start, None if step < 0 and end < -(2**30) else end, step)
    return out


@channel_rule("Slice")
def slice_channels(channels: Channels, node: Node) -> None:
    """The selected indices pass. With a step, the neighbours among which it selects are kept or cut together."""
    x = channels.input_rows(node, 0)
    shape, dims = channels.shape(node.outputs[0]), channels.trace.dims(node.inputs[0])
    slices = constant_slices(channels.graph, node, len(x))
    out = list(x)
    if slices is None:
        axes = list(range(channels.shape(node.inputs[1])[0]))
        if channels.has_input(node, 3):
            axis_numbers = channels.constant_input(node, 3)
            axes = list(range(len(x))) if axis_numbers is None else [int(a) % len(x) for a in axis_numbers]
        channels.fix([x[a] for a in axes])
        for axis in axes:
            out[axis] = fixed_row(shape[axis])
    else:
        for axis, indices in slices.items():
            row, step = x[axis], indices.step
            if dims[axis] is None or row[indices].size != shape[axis]:
                channels.atoms.fix(row)
                out[axis] = fixed_row(shape[axis])
                continue
            # A step within each block takes one of `step` neighbours, so they can only be cut together.
            if row.any() and step > 1 and row.size % step == 0:
                blocks = row.reshape(-1, step)
                channels.atoms.tie(blocks, blocks[:, :1])
            out[axis] = channels.take(row, np.arange(row.size)[indices])
    channels.set_output(node, out)


def indices_after_cut(
    sizes: Sizes, node: Node, indices: npt.NDArray[np.int64], axis: int, out_axis: int
) -> npt.NDArray[np.int64]:
    """The new indices of an axis for those selected indices that the cut has left."""
    kept_indices = sizes.kept_indices(node.inputs[0], axis)
    new_positions = np.full(int(max(kept_indices.max(), indices.max())) + 1, -1, np.int64)
    new_positions[kept_indices] = np.arange(kept_indices.size)
    new_indices = new_positions[indices[sizes.kept_indices(node.outputs[0], out_axis)]]
    if np.any(new_indices < 0):
        raise ModelError(f"{node.op} {node.name} takes channels that are cut")
    return new_indices


@rewrite("Slice")
def slice_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Along an axis that is cut, select the indices that are left, by a slice if they are consecutive."""
    rank = len(sizes.full_sizes(node.inputs[0]))
    slices = constant_slices(graph, node, rank) or {}
    cut = [axis for axis in slices if sizes.is_shorter(node.inputs[0], axis)]
    if not cut:
        return
    remaining = dict(slices)
    for axis in cut:
        full = np.arange(sizes.full_sizes(node.inputs[0])[axis] or 0)
        indices = indices_after_cut(sizes, node, full[slices[axis]], axis, axis)
        if np.all(np.diff(indices) == 1):
            remaining[axis] = slice(int(indices[0]), int(indices[-1]) + 1, 1)
        else:
            node.inputs[0] = graph.emit("Gather", node.inputs[0], graph.ints(*indices.tolist()), attrs={"axis": axis})
            del remaining[axis]
    if not remaining:
        node.op, node.inputs = "Identity", node.inputs[:1]
        return
    starts = [p.start for p in remaining.values()]
    stops = [-(2**62) if p.stop is None else p.stop for p in remaining.values()]
    steps = [p.step for p in remaining.values()]
    node.inputs[1:] = [graph.ints(*starts), graph.ints(*stops), graph.ints(*remaining), graph.ints(*steps)]


@dataclass
class _Ranges:
    """The ranges that a Slice takes, by how they are written, and the output's shape.

    Attributes:
        runs: Axis, begin and stop of consecutive indices.
        strided: Axis and indices with a step along an axis of fixed size.
        stepped: Axis and indices with a step along channels, within each of them.
    """

    out: list[Dim]
    runs: list[tuple[int, Dim, Dim]] = field(default_factory=list)
    strided: list[tuple[int, range]] = field(default_factory=list)
    stepped: list[tuple[int, range]] = field(default_factory=list)


@gradient_rule("Slice")
def slice_ranges(tape: Tape, node: Node) -> Pull:
    """Ranges with any step along fixed axes, and whole runs of channels. The gradient is padded with zeros."""
    name, g = node.inputs[0], tape.graph
    y, shape, ranges = tape.value(name), tape.shape(name), _read_ranges(tape, node)
    if ranges.runs:
        axes, begins, stops = zip(*ranges.runs, strict=True)
        run_axes = g.ints(*axes)
        y = g.emit("Slice", y, tape.sizes(begins), tape.sizes(stops), run_axes)
    for axis, picked in ranges.strided:
        # A stop of −1 would mean the last index, so a range that ends before index 0 gets a very low one.
        last = picked.stop if picked.stop >= 0 else -(2**31)
        y = g.emit("Slice", y, g.ints(picked.start), g.ints(last), g.ints(axis), g.ints(picked.step))
    for axis, picked in ranges.stepped:
        y = g.emit("Slice", y, g.ints(picked.start), g.ints(2**62), g.ints(axis), g.ints(picked.step))
    tape.enter(node.outputs[0], y, tuple(ranges.out))

    def pull(dy: str) -> None:
        sizes = list(ranges.out)
        for axis, picked in ranges.stepped:
            spaced = g.emit("Unsqueeze", dy, g.ints(axis + 1))
            pads = [0] * (2 * len(shape) + 2)
            # Each picked element gets its neighbours that were skipped, as zeros, on an axis of its own.
            pads[axis + 1], pads[axis + len(shape) + 2] = picked.start, picked.step - picked.start - 1
            between = (*sizes[: axis + 1], picked.step, *sizes[axis + 1 :])
            sizes[axis] = shape[axis]
            dy = tape.reshape(g.emit("Pad", spaced, g.ints(*pads)), between, tuple(sizes))
        for axis, picked in ranges.strided:
            dy = scatter_picks(tape, dy, tuple(sizes), axis, np.array(picked), tape.extent(shape[axis]))
            sizes[axis] = shape[axis]
        tape.add_gradient(name, put_back(tape, dy, shape, ranges.runs) if ranges.runs else dy)

    return pull


def _read_ranges(tape: Tape, node: Node) -> _Ranges:
    """The ranges of a Slice node. Raises `ModelError` if one can't hold at every width."""
    shape = tape.shape(node.inputs[0])
    ranges = _Ranges(list(shape))
    for axis, indices in _slices([tape.required_constant(node, i) for i in (1, 2, 3, 4)], len(shape)).items():
        size = tape.extent(shape[axis])
        picked = range(size)[indices]
        if not picked:
            raise ModelError(f"{describe(node)} cuts out nothing", got=f"{indices} of {shape[axis]}")
        if picked == range(size):
            continue
        if indices.step == 1:
            begin, stop = _run_bounds(tape, node, axis, picked)
            ranges.runs.append((axis, begin, stop))
            ranges.out[axis] = tape.difference(stop, begin)
        elif isinstance(shape[axis], int):
            ranges.strided.append((axis, picked))
            ranges.out[axis] = len(picked)
        else:
            ranges.stepped.append((axis, picked))
            ranges.out[axis] = _stepped_count(tape, node, axis, picked)
    return ranges


def _stepped_count(tape: Tape, node: Node, axis: int, picked: range) -> Dim:
    """The number of elements that a step selects along channels. Each channel must have a multiple of the step."""
    name = node.inputs[0]
    dim, segments = tape.shape(name)[axis], tape.axis(name, axis)
    size, step = tape.extent(dim), picked.step
    count = tape.quotient(dim, step) if step > 0 else None
    even = segments is not None and all(
        (s.length if s.group == FIXED else s.inner) % step == 0 for s in segments.segments
    )
    if count is None or not even or picked.start >= step or len(picked) != size // step:
        raise ModelError(
            f"{describe(node)}: a step that is not within each channel", expected="a run of channels", got=picked
        )
    return count


def _run_bounds(tape: Tape, node: Node, axis: int, picked: range) -> tuple[Dim, Dim]:
    """The bounds of a run of indices, as they are at every width."""
    begin, stop = (tape.kept_prefix(node.inputs[0], axis, n) for n in (picked.start, picked.stop))
    if begin is None or stop is None:
        raise ModelError(
            f"{describe(node)} cuts a run of channels, or the batch",
            expected="bounds between channel groups",
            got=f"{picked.start} to {picked.stop} of {tape.shape(node.inputs[0])[axis]}",
        )
    return begin, stop
