"""Rewrites writes to slices, such as `x[:, :k] = y` and `x[..., i] += y`, as pieces that are concatenated.

Exporters write them as scatters, whose indices are computed from sizes. No analysis can follow channels through these,
while Slice and Concat tie what is written and what is left to channels as anywhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Array, Graph, Node, Port
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.trace import TRACE_BATCHES, Trace

# A write to every second channel would be as many runs of indices as channels.
_MAX_RUNS = 8
_REDUCTIONS = {"none": "", "add": "Add", "mul": "Mul"}


class _Write(NamedTuple):
    """The indices of one axis that a scatter writes, for all indices of the others; None for all in order.

    `is_single`: whether the updates lack this axis, because only one index is written.
    """

    axis: int
    indices: list[int] | None
    is_single: bool


def rewrite_scatter_writes(graph: Graph, trace: Trace, constants: Container[str], notes: list[str]) -> None:
    """Rewrite each scatter that writes everything, or constant indices of one axis. Adds a note on the latter."""
    scatters = [n for n in graph.nodes if n.op in ("ScatterND", "ScatterElements") and not n.domain]
    known_values = _values_from_sizes(graph, constants) if scatters else set()
    scatters = [
        n
        for n in scatters
        if n.inputs[1] in known_values and {n.inputs[0], n.inputs[2], n.outputs[0]} <= trace.shapes.keys()
    ]
    if not scatters:
        return
    indices, indices_second = (_index_values(graph, scatters, batch) for batch in TRACE_BATCHES)
    writes: dict[int, _Write] = {}
    for node in scatters:
        write = _find_write(node, indices[node.inputs[1]], trace.shapes, trace.batched(node.inputs[0]))
        second = _find_write(node, indices_second[node.inputs[1]], trace.shapes_second, trace.batched(node.inputs[0]))
        if write is None or write != second or node.attrs.get("reduction", "none") not in _REDUCTIONS:
            continue
        if write.indices is None or len(_runs(sorted(write.indices))) <= _MAX_RUNS:
            writes[id(node)] = write
    makers = graph.producers()
    nodes, graph.nodes = graph.nodes, []
    count = 0
    for node in nodes:
        write = writes.get(id(node))
        if write is None:
            graph.nodes.append(node)
        elif write.indices is None:
            operator = _REDUCTIONS[node.attrs.get("reduction", "none")]
            inputs = node.inputs[::2] if operator else node.inputs[2:]
            graph.emit(operator or "Identity", *inputs, out=node.outputs[0])
        else:
            _write_pieces(graph, node, write, makers, trace)
            count += 1
    graph.prune()
    if count:
        writes_are = "A write to a slice is" if count == 1 else f"{count} writes to slices are"
        notes.append(f"{writes_are} put together from what is written and what is left.")


def _values_from_sizes(graph: Graph, constants: Container[str]) -> set[str]:
    """Values that are computed from constants and sizes alone."""
    out = {name for name in graph.initializers if name in constants}
    for node in graph.nodes:
        if not node.domain and (node.op in SIZE_OPERATORS or out.issuperset(filter(None, node.inputs))):
            out.update(filter(None, node.outputs))
    return out


def _index_values(graph: Graph, scatters: Sequence[Node], batch: int) -> dict[str, Array]:
    """The indices of scatters at a batch size, by name."""
    names = list(dict.fromkeys(n.inputs[1] for n in scatters))
    computed = [name for name in names if name not in graph.initializers]
    values = {name: graph.initializers[name] for name in names if name in graph.initializers}
    if computed:
        probe = graph.copy()
        probe.outputs = [Port(name, np.dtype(np.int64), ()) for name in computed]
        probe.prune()
        values |= OnnxSession(probe.to_bytes()).run(sample_feeds(graph, batch, seed=0), computed)
    return values


def _find_write(
    node: Node, indices: Array, shapes: Mapping[str, tuple[int, ...]], batched: Sequence[bool]
) -> _Write | None:
    """What a scatter writes; None if it isn't some indices of one axis and all of the others."""
    data, updates = shapes[node.inputs[0]], shapes[node.inputs[2]]
    if node.op == "ScatterElements":
        axis = int(node.attrs.get("axis", 0)) % len(data)
        covers = all(n == m for i, (n, m) in enumerate(zip(data, updates, strict=True)) if i != axis)
        coordinates, lead_axes = {axis: indices}, list(range(len(data)))
        candidates = [axis] if covers else []
        is_single = False
    else:
        depth = indices.shape[-1]
        is_single = indices.ndim == depth
        if not is_single and indices.ndim != depth + 1:
            return None
        coordinates = dict(enumerate(np.moveaxis(indices, -1, 0)))
        lead_axes = list(range(depth))
        candidates = list(reversed(range(depth)))
    for axis in candidates:
        axes = [a for a in lead_axes if a != axis or not is_single]
        grid = {a: np.arange(data[a]) for a in coordinates if a != axis}
        grid[axis] = coordinates[axis][tuple(slice(None) if a == axis else 0 for a in axes)].reshape(-1)
        if all(_is_along(coordinates[a], grid[a], axes.index(a) if a in axes else None) for a in coordinates):
            written = (grid[axis] % data[axis]).tolist()
            if written == list(range(data[axis])) and not is_single:
                return _Write(axis, None, is_single)
            # Which of several writes to one index wins isn't defined. What is written along the batch must follow it.
            if len(set(written)) == len(written) and not batched[axis]:
                return _Write(axis, written, is_single)
    return None


def _is_along(values: Array, numbers: Array, axis: int | None) -> bool:
    """Whether an array holds these numbers along one of its axes, and the same along the others.

    `axis`: None where all values are the one number.
    """
    if axis is None:
        return bool((values == numbers).all())
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    return values.shape[axis] == numbers.size and bool((values == numbers.reshape(shape)).all())


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers in an ascending list, as their bounds in the list."""
    ends = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(indices)) if b != a + 1]
    return list(itertools.pairwise([0, *ends, len(indices)]))


def _write_pieces(graph: Graph, node: Node, write: _Write, makers: Mapping[str, Node], trace: Trace) -> None:
    """Write a scatter as a concatenation of what it writes and what it leaves."""
    indices = write.indices or []
    size, written = trace.shapes[node.inputs[0]][write.axis], sorted(indices)
    data, updates, axis, perm = *node.inputs[::2], write.axis, None
    if write.is_single:
        updates = graph.emit("Unsqueeze", updates, graph.ints(axis))
    # torch moves the axis that it writes to to the front; the pieces are taken from the value before that.
    mover = makers.get(data)
    if mover is not None and mover.op == "Transpose" and not mover.domain and "perm" in mover.attrs:
        perm = [int(p) for p in mover.attrs["perm"]]
        data, axis = mover.inputs[0], perm[axis]
        # Transpositions there and back are removed later.
        updates = graph.emit("Transpose", updates, attrs={"perm": [perm.index(i) for i in range(len(perm))]})
    if written != indices:
        order = np.argsort(indices).tolist()
        updates = graph.emit("Gather", updates, graph.ints(*order), attrs={"axis": axis})
    operator = _REDUCTIONS[node.attrs.get("reduction", "none")]

    def piece(value: str, start: int, stop: int) -> str:
        return graph.emit("Slice", value, graph.ints(start), graph.ints(stop), graph.ints(axis))

    pieces, position, runs = [], 0, _runs(written)
    for first, last in runs:
        start, stop = written[first], written[last - 1] + 1
        pieces += [piece(data, position, start)] if start > position else []
        new = updates if len(runs) == 1 else piece(updates, first, last)
        pieces.append(graph.emit(operator, piece(data, start, stop), new) if operator else new)
        position = stop
    pieces += [piece(data, position, size)] if position < size else []
    together = graph.emit("Concat", *pieces, attrs={"axis": axis}, out=node.outputs[0] if perm is None else None)
    if perm is not None:
        graph.emit("Transpose", together, attrs={"perm": perm}, out=node.outputs[0])
