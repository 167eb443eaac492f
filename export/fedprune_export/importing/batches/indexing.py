"""Reading and writing at positions, where the file's own form holds its batch size."""

from __future__ import annotations

import numpy as np

from fedprune_export.importing.batches.forms import along_axis, axis_of, own_axis, plain
from fedprune_export.importing.batches.places import Place
from fedprune_export.importing.batches.propagation import Propagation
from fedprune_export.ir.graph import Node


def gather(state: Propagation, node: Node) -> None:
    data, indices = node.inputs[:2]
    place = state.places.get(data)
    if place is None:
        along_axis(0)(state, node)
        return
    axis = axis_of(state, node, 0)
    if place.added or axis != place.axis:
        if indices in state.places:
            state.refuse(node, "data and indices have the batch")
        along_axis(0)(state, node)
        return
    if _gather_in_samples(state, node):
        return
    if not (state.may_drop and place.is_exact and state.numbers(indices) in ([0], [-1])):
        state.refuse(node, "it takes single samples of the batch")
    if state.rank(indices):
        state.emit("Identity", data, out=node.outputs[0])
        state.locate(node)
    else:
        own_axis(state, node, data, place.axis)


def _gather_in_samples(state: Propagation, node: Node) -> bool:
    """Write a Gather from rows of all samples, [n · size, ...], whose indices are the same in each sample.

    Returns whether they are. Masks of attention are read in this way.
    """
    data, place = node.inputs[0], state.places[node.inputs[0]]
    indices = state.constant_value(node.inputs[1])
    size = place.inner
    if place.axis or place.outer > 1 or place.is_exact or indices is None or indices.shape[:1] != (state.batch,):
        return False
    starts = (np.arange(state.batch) * size).reshape(-1, *[1] * (indices.ndim - 1))
    if np.any(indices != indices[:1] + starts) or indices[0].min() < 0 or indices[0].max() >= size:
        return False
    rows = state.emit("Reshape", data, state.ints(-1, size, *state.shapes.shapes[data][1:]))
    state.emit("Gather", rows, state.constant(indices[0]), out=node.outputs[0], axis=1)
    state.locate(node)
    return True


def gather_nd(state: Propagation, node: Node) -> None:
    """Indices [sample, position] with the same positions in each sample become positions alone."""
    data, place = node.inputs[0], state.places.get(node.inputs[0])
    indices = None if node.attrs.get("batch_dims") else state.constant_value(node.inputs[1])
    if place == Place(0) and indices is not None and indices.shape[-1] == 2 and len(indices) == state.batch:
        samples = np.arange(state.batch).reshape(-1, *[1] * (indices.ndim - 2))
        if np.all(indices[..., 0] == samples) and np.all(indices[..., 1] == indices[:1, ..., 1]):
            state.emit("Gather", data, state.constant(indices[0, ..., 1]), out=node.outputs[0], axis=1)
            state.locate(node)
            return
    indexed(state, node)


def indexed(state: Propagation, node: Node) -> None:
    if node.inputs[1] not in state.places:
        state.refuse(node, "it reads or writes at positions that are numbers of single samples")
    plain(state, node)


def slice_values(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    place = state.places.get(data)
    if place is None:
        state.refuse(node, "where it cuts depends on the batch")
    starts, ends = (state.numbers(i) for i in node.inputs[1:3])
    axes = state.axes(node, 3, range(len(starts or [])))
    if starts is None or ends is None or axes is None:
        state.refuse(node, "where it cuts depends on the data")
    steps = (state.numbers(node.inputs[4]) if len(node.inputs) > 4 else None) or [1] * len(axes)
    kept = list(range(len(axes)))
    if not place.added and place.axis in axes:
        i, size = axes.index(place.axis), state.fixed.shapes[data][place.axis]
        is_whole = starts[i] in (0, -size) and steps[i] == 1 and ends[i] >= size
        is_single = state.batch == 1 and not state.may_drop
        if not is_whole or (is_single and ends[i] == size):
            state.refuse(node, "it takes single samples of the batch")
        kept.remove(i)
    if not kept:
        state.emit("Identity", data, out=node.outputs[0])
    elif place.added or len(kept) < len(axes):
        parts = (starts, ends, [a + int(place.added) for a in axes], steps)
        node.inputs = [data, *(state.ints(*(part[i] for i in kept)) for part in parts)]
        state.append(node)
    else:
        state.write(node)


def split(state: Propagation, node: Node) -> None:
    place = state.places.get(node.inputs[0])
    if place is not None and not place.added and axis_of(state, node, 0) == place.axis:
        if len(node.outputs) > 1:
            state.refuse(node, "it splits the axis of the batch")
        state.emit("Identity", node.inputs[0], out=node.outputs[0])
        state.locate(node)
        return
    along_axis(0)(state, node)
