"""Gives a graph a free batch as the first axis of its inputs and outputs, whatever batch its file has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedprune.core.errors import ModelError, value_text
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.batches.layout import end_with, move_batch_first, move_outputs_first, possible_layouts
from fedprune_export.importing.batches.propagation import FREE_BATCH_HINT, FreeingError, Propagation
from fedprune_export.importing.batches.rules import write_node
from fedprune_export.importing.original import relative_distance
from fedprune_export.importing.raw_file import BatchLayout, RawFile
from fedprune_export.ir.graph import Array, Graph, Port
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.shape_inference import ShapeError
from fedprune_export.ir.trace import shapes_at_batch

# Batch sizes at which a file with a free batch is tried, and those that its inside may be made for.
_TRIAL_BATCHES = (3, 5)
_USUAL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

# Places of the batch that a graph for one sample leaves open are tried, at most so often, and proved so often.
_MAX_FAILURES, _MAX_PROOFS = 400, 8

# Batches of samples that are run for the proof, and how far outputs may differ, relative to the largest number.
_PROOF_BATCHES = 2
_TOLERANCE = 1e-3


def free_batch(graph: Graph, raw: bytes, notes: list[str]) -> tuple[Graph, BatchLayout]:
    """A graph whose inputs and outputs have a free batch as their first axis, and where the file has it.

    Raises `ModelError` if the batch can't be made free, or samples of one batch depend on each other.
    """
    errors: list[ModelError] = []
    for layout in possible_layouts(graph):
        moved = move_batch_first(graph, layout)
        if layout.size is None and (axes := _output_axes(moved)) is not None:
            moved = _with_fixed_positions(moved, layout, raw, axes)
            least = 2 if _write_squeezed_axes(moved) else 1
            freed, layout = moved, BatchLayout(None, layout.inputs, axes, least)
            for port in freed.outputs:
                port.shape = (None,) * len(port.shape)
            move_outputs_first(freed, axes)
        else:
            try:
                freed, layout = _free(moved, layout, raw)
            except ModelError as error:
                errors.append(error)
                continue
            notes.append(f"The file's batch of {layout.size} was made free.")
        _note_axes(layout, notes)
        return freed, layout
    raise errors[0]


def _output_axes(graph: Graph) -> dict[str, int] | None:
    """The axis of each output that holds a free batch; None if the graph doesn't take any batch."""
    try:
        first, second = (shapes_at_batch(graph, batch).shapes for batch in _TRIAL_BATCHES)
    except ShapeError:
        return None
    out = {}
    for port in graph.outputs:
        pairs = list(zip(first[port.name], second[port.name], strict=True))
        axes = [a for a, pair in enumerate(pairs) if pair[0] != pair[1]]
        if not axes or (len(axes) == 1 and axes[0] and pairs[axes[0]] != _TRIAL_BATCHES):
            return None
        # Where several axes follow the batch, the first has to be it.
        out[port.name] = axes[0] if len(axes) == 1 else 0
        port.shape = (None,) * len(pairs)
    return out


def _with_fixed_positions(graph: Graph, layout: BatchLayout, raw: bytes, axes: Mapping[str, int]) -> Graph:
    """A graph that reads no positions which it computes from the batch's size; itself if it reads none, or must.

    torch writes masks and token types in this way: [sample, position] in a batch of any size. The graph for one sample
    has constants there.
    """
    if (single := _with_constant_positions(graph, 1)) is None:
        return graph
    try:
        freed, _ = _search(single, Propagation(single, 1, may_drop=False), BatchLayout(1, layout.inputs), raw)
    except ModelError:
        return graph
    return freed if _output_axes(freed) == dict.fromkeys(axes, 0) and not any(axes.values()) else graph


def _with_constant_positions(graph: Graph, batch: int) -> Graph | None:
    """A graph whose sizes are computed for one batch size, if it reads positions that follow from sizes; else None."""
    by_sizes = {name for name, value in graph.initializers.items() if value.dtype.kind in "iub" or value.size == 1}
    for node in graph.nodes:
        reads = node.inputs[:1] if node.op == "CastLike" else node.inputs
        if node.op in SIZE_OPERATORS or by_sizes.issuperset(filter(None, reads)):
            by_sizes.update(node.outputs)
    positions = {n.inputs[1] for n in graph.nodes if n.op in ("Gather", "GatherND") and n.outputs[0] not in by_sizes}
    if not positions & (by_sizes - set(graph.initializers)):
        return None
    constant, known = graph.copy(), shapes_at_batch(graph, batch).numbers
    for node in graph.nodes:
        # Numbers that aren't whole may be computed from parameters.
        if all(name in known and name in by_sizes and known[name].dtype.kind in "iub" for name in node.outputs):
            constant.initializers |= {name: known[name] for name in node.outputs}
    constant.nodes = [n for n in constant.nodes if n.outputs[0] not in constant.initializers]
    return constant


def _write_squeezed_axes(graph: Graph) -> bool:
    """Write the axes of each Squeeze without axes, which would also remove a batch of 1.

    Returns whether there is such a node.
    """
    bare = [n for n in graph.nodes if n.op == "Squeeze" and not n.domain and not n.attrs and len(n.inputs) == 1]
    shapes = shapes_at_batch(graph, _TRIAL_BATCHES[0]).shapes if bare else {}
    for node in bare:
        node.inputs.append(graph.ints(*(a for a, size in enumerate(shapes[node.inputs[0]]) if size == 1)))
    return bool(bare)


def _free(graph: Graph, layout: BatchLayout, raw: bytes) -> tuple[Graph, BatchLayout]:
    """A graph of one batch size for any, proved by the file, and its layout."""
    errors: list[ModelError] = []
    for size in _USUAL_BATCHES if layout.size is None else (layout.size,):
        try:
            # A file that takes any batch must not drop what it does along it.
            source = _with_constant_positions(graph, size) or graph
            return _search(source, Propagation(source, size, may_drop=layout.size is not None), layout, raw)
        except ModelError as error:  # noqa: PERF203
            errors.append(error)
    # A node that fixes the batch says more than sizes that fit no other batch.
    raise next((e for e in errors if isinstance(e, FreeingError)), errors[0])


def _search(graph: Graph, state: Propagation, layout: BatchLayout, raw: bytes) -> tuple[Graph, BatchLayout]:
    """Write node by node; where one can't be written, take the next place that a node before it has left open."""
    options: list[tuple[int, int]] = []  # of each node: the option taken, and their count
    lengths: list[int] = []  # of the graph before each node
    furthest, reason, proofs = -1, FreeingError("the batch can't be made free"), 0
    for _ in range(_MAX_FAILURES):
        try:
            while len(options) < len(graph.nodes):
                lengths[len(options) :] = [len(state.graph.nodes)]
                write_node(state, graph.nodes[len(options)].copy())
                options.append((state.option, state.option_count))
                state.option = 0
            freed, outputs = _finish(graph, state)
            proofs += 1
            proved = BatchLayout(state.batch, layout.inputs, outputs)
            _prove(freed, RawFile(raw, list(outputs), proved))
        except FreeingError as error:
            if len(options) > furthest:
                furthest, reason = len(options), error
            while options and options[-1][0] + 1 >= options[-1][1]:
                options.pop()
            if not options or proofs >= _MAX_PROOFS:
                break
            state.option = options.pop()[0] + 1
            state.roll_back(lengths[len(options)])
            continue
        return freed, proved
    raise reason


def _finish(graph: Graph, state: Propagation) -> tuple[Graph, dict[str, int | None]]:
    """The graph that was written, with the batch first in its outputs, and the outputs' axes of it in the file."""
    makers = graph.producers()
    axes: dict[str, int | None] = {}
    freed = state.graph.copy()
    for port in freed.outputs:
        place = state.places.get(port.name)
        if place is None or not place.is_exact:
            state.refuse(makers[port.name], f"the output {value_text(port.name)} has no axis for the batch")
        axes[port.name] = None if place.added else place.axis
        port.shape = (None,) * len(state.shapes.shapes[port.name])
        shape = state.fixed.shapes[port.name]
        # An output [1, classes] of one sample: the 1 stands for the batch, wherever it comes from.
        if place.added and len(shape) > 1 and shape[0] == 1:
            end_with(freed, port, "Squeeze", freed.ints(1))
            axes[port.name], port.shape = 0, port.shape[1:]
    move_outputs_first(freed, {name: axis or 0 for name, axis in axes.items()})
    for port in freed.outputs:
        port.shape = ("N", *port.shape[1:])
    return freed, axes


def _prove(freed: Graph, file: RawFile) -> None:
    """Compare a graph of any batch with the file.

    Raises `FreeingError` if outputs differ, or samples depend on each other.
    """
    size = file.layout.size or 1
    count = _PROOF_BATCHES * size + (1 if size == 1 else 0)
    feeds = {p.name: _of_type(sample_feeds(freed, count)[p.name], p) for p in freed.inputs}
    expected = file.run(feeds)
    # The same samples one position further: a row that changes depends on its place or on its neighbours.
    shifted = file.run({name: np.roll(value, 1, 0) for name, value in feeds.items()}) if size > 1 else {}
    for name, rows in shifted.items():
        if not relative_distance(np.roll(expected[name], 1, 0), rows) <= _TOLERANCE:
            raise FreeingError(
                f"the samples of a batch of {size} depend on each other, or on their place in the batch",
                expected=f"the same output {value_text(name)} for a sample at any place",
                hint=FREE_BATCH_HINT,
            )
    try:
        found = OnnxSession(freed.to_bytes()).run(feeds)
    except ModelError as error:
        raise FreeingError(f"the file is made for batches of {size} ({error})", hint=FREE_BATCH_HINT) from error
    for name, rows in expected.items():
        # Outputs that aren't finite are refused later, with the reason.
        if not relative_distance(rows, found[name]) <= _TOLERANCE:
            raise FreeingError(
                f"the file is made for batches of {size}, and with a free batch output {value_text(name)} differs",
                hint=FREE_BATCH_HINT,
            )


def _of_type(value: Array, port: Port) -> Array:
    return value if value.dtype == port.dtype else np.abs(value).astype(port.dtype)


def _note_axes(layout: BatchLayout, notes: list[str]) -> None:
    for kind, axes in (("input", layout.inputs), ("output", layout.outputs)):
        names = [value_text(name) for name, axis in axes.items() if axis]
        if names:
            notes.append(
                f"The batch is the second axis of {kind} {', '.join(names)} in the file, and the first one here."
            )
