"""Rewrites writes to slices, such as `x[:, :k] = y` and `x[..., i] += y`, as pieces that are concatenated.

Exporters write them as scatters, whose indices are computed from sizes. No analysis can follow channels through these,
while Slice and Concat tie what is written and what is left to channels as anywhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import TRACE_BATCHES, Trace, run_values

# A write to every second channel would be as many runs of indices as channels.
_MAX_RUNS = 8
_REDUCTIONS = {"none": "", "add": "Add", "mul": "Mul"}
_SCATTERS = ("ScatterND", "ScatterElements")


class _Write(NamedTuple):
    """The indices of one axis that a scatter writes, for all indices of the others.

    `is_single`: whether the updates lack this axis, because only one index is written.
    """

    axis: int
    indices: list[int]
    is_single: bool


def rewrite_scatter_writes(graph: Graph, trace: Trace, constants: Container[str], notes: list[str]) -> None:
    """Rewrite each scatter that writes constant indices of one axis. Adds a note on them."""
    # Indices that are computed from weights are others once these are trained.
    varying = graph.values_from_inputs(*(name for name in graph.initializers if name not in constants))
    scatters = [
        n
        for n in graph.nodes
        if n.op in _SCATTERS
        and not n.domain
        and n.inputs[1] not in varying
        and {n.inputs[0], n.inputs[2], n.outputs[0]} <= trace.shapes.keys()
    ]
    if not scatters:
        return
    indices, indices_second = (_index_values(graph, scatters, batch) for batch in TRACE_BATCHES)
    writes: dict[str, _Write] = {}
    for node in scatters:
        write = _find_write(node, indices[node.inputs[1]], trace.shapes, trace.batched(node.inputs[0]))
        second = _find_write(node, indices_second[node.inputs[1]], trace.shapes_second, trace.batched(node.inputs[0]))
        if write is None or write != second or node.attrs.get("reduction", "none") not in _REDUCTIONS:
            continue
        if len(_runs(sorted(write.indices))) <= _MAX_RUNS:
            writes[node.outputs[0]] = write
    graph.rewrite(dict.fromkeys(_SCATTERS, _write_pieces), writes, graph.producers(), trace)
    graph.prune()
    if writes:
        writes_are = "A write to a slice is" if len(writes) == 1 else f"{len(writes)} writes to slices are"
        notes.append(f"{writes_are} put together from what is written and what is left.")


def _index_values(graph: Graph, scatters: Sequence[Node], batch: int) -> Mapping[str, Array]:
    """The indices of scatters at a batch size, by name."""
    computed = {n.inputs[1] for n in scatters} - graph.initializers.keys()
    return {**graph.initializers, **(run_values(graph, sorted(computed), batch) if computed else {})}


def _find_write(
    node: Node, indices: Array, shapes: Mapping[str, tuple[int, ...]], batched: Sequence[bool]
) -> _Write | None:
    """What a scatter writes; None if it isn't some indices of one axis and all of the others."""
    # Where each number of the updates is written to, counted from 1.
    numbers = np.arange(1, math.prod(shapes[node.inputs[2]]) + 1).reshape(shapes[node.inputs[2]])
    places = np.zeros(shapes[node.inputs[0]], np.int64)
    if node.op == "ScatterElements":
        np.put_along_axis(places, indices, numbers, int(node.attrs.get("axis", 0)))
    else:
        places[tuple(np.moveaxis(indices, -1, 0))] = numbers
    is_single = numbers.ndim == places.ndim - 1
    # Which of several writes to one place wins isn't defined.
    if np.count_nonzero(places) < max(numbers.size, 1) or not (is_single or numbers.ndim == places.ndim):
        return None
    for axis in reversed(range(places.ndim)):
        rows = np.moveaxis(places, axis, 0).reshape(places.shape[axis], -1)
        updates = np.moveaxis(np.expand_dims(numbers, axis) if is_single else numbers, axis, 0)
        updates = updates.reshape(len(updates), -1)
        index_of = {number: index for index, number in enumerate(rows[:, 0].tolist())}
        written = [index_of.get(number, 0) for number in updates[:, 0].tolist()]
        if rows.shape[1] != updates.shape[1] or not np.array_equal(rows[written], updates):
            continue
        # What is written along the batch must follow it.
        if not batched[axis]:
            return _Write(axis, written, is_single)
    return None


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers in an ascending list, as their bounds in the list."""
    ends = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(indices)) if b != a + 1]
    return list(itertools.pairwise([0, *ends, len(indices)]))


def _write_pieces(
    graph: Graph, node: Node, writes: Mapping[str, _Write], makers: Mapping[str, Node], trace: Trace
) -> None:
    """Write a scatter as a concatenation of what it writes and what it leaves."""
    write, operator = writes.get(node.outputs[0]), _REDUCTIONS.get(node.attrs.get("reduction", "none"), "")
    if write is None:
        graph.nodes.append(node)
        return
    indices = write.indices
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
