"""Gives a graph a free batch as the first axis of its inputs and outputs, whatever batch its file has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np

from fedprune.core.errors import ModelError, value_text
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.batches.forms import node_forms
from fedprune_export.importing.batches.layout import move_batch_first, move_outputs_first, possible_layouts
from fedprune_export.importing.batches.propagation import FREE_BATCH_HINT, Propagation
from fedprune_export.importing.raw_file import BatchLayout, RawFile
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.shape_inference import ShapeError
from fedprune_export.ir.trace import TRACE_BATCHES, shapes_at_batch

# Batch sizes that the inside of a file with a free batch may be made for.
_USUAL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

# How often nodes are written in vain, and how often the whole graph is.
_MAX_FAILURES, _MAX_PROOFS = 400, 8


def free_batch(graph: Graph, raw: bytes, notes: list[str]) -> tuple[Graph, BatchLayout]:
    """A graph whose inputs and outputs have a free batch as their first axis, and where the file has it.

    Raises `ModelError` if the batch can't be made free, or samples of one batch depend on each other.
    """
    errors: list[ModelError] = []
    for layout in possible_layouts(graph):
        moved = move_batch_first(graph, layout)
        axes = _output_axes(moved) if layout.size is None else None
        if axes is not None:
            freed, layout = _free_inside(moved, axes, layout, raw)
        else:
            for size in _USUAL_BATCHES if layout.size is None else (layout.size,):
                try:
                    freed, layout = _search(moved, size, layout, raw)
                except ModelError as error:  # noqa: PERF203
                    errors.append(error)
                else:
                    break
            else:
                continue
            notes.append(f"The file's batch of {layout.size} was made free.")
        for kind, places in (("input", layout.inputs), ("output", layout.outputs)):
            if names := ", ".join(value_text(name) for name, axis in places.items() if axis):
                notes.append(f"The batch is the second axis of {kind} {names} in the file, and the first one here.")
        return freed, layout
    # A node that fixes the batch says more than sizes that fit no other batch.
    raise next((e for e in errors if not isinstance(e, ShapeError)), errors[0])


def _output_axes(graph: Graph) -> dict[str, int] | None:
    """The axis of each output that holds a free batch; None if the graph doesn't take any batch."""
    try:
        first, second = (shapes_at_batch(graph, batch).shapes for batch in TRACE_BATCHES)
    except ShapeError:
        return None
    out: dict[str, int] = {}
    for port in graph.outputs:
        pairs = list(zip(first[port.name], second[port.name], strict=True))
        axes = [a for a, pair in enumerate(pairs) if pair[0] != pair[1]]
        if not axes or (len(axes) == 1 and axes[0] and pairs[axes[0]] != TRACE_BATCHES):
            return None
        # Where several axes follow the batch, the first has to be it.
        out[port.name] = axes[0] if len(axes) == 1 else 0
        port.shape = (None,) * len(pairs)
    return out


def _free_inside(graph: Graph, axes: Mapping[str, int], layout: BatchLayout, raw: bytes) -> tuple[Graph, BatchLayout]:
    """A graph that takes any batch, without what it can do without: a Squeeze that would remove a batch of 1, and
    positions [sample, position] that it computes from the batch's size, as torch writes masks and token types."""
    is_squeezed = any(n.op == "Squeeze" and not n.domain and not n.attrs and len(n.inputs) == 1 for n in graph.nodes)
    least = 2 if is_squeezed else 1
    layout = BatchLayout(None, layout.inputs, axes, least)
    if is_squeezed or _with_constant_positions(graph, least) is not graph:
        with suppress(ModelError):
            freed, proved_layout = _search(graph, least, layout, raw)
            if proved_layout.outputs == axes:
                return freed, layout
    move_outputs_first(graph, axes)
    return graph, layout


def _with_constant_positions(graph: Graph, batch: int) -> Graph:
    """A graph with constants, for one batch size, for what follows from sizes; itself if it reads no such positions."""
    reads = [n for n in graph.nodes if n.op in ("Gather", "GatherND") and n.inputs[1] not in graph.initializers]
    numbers = shapes_at_batch(graph, batch).numbers if reads else {}
    integers = {name: value for name, value in numbers.items() if value.dtype.kind in "iub"}
    if not any(n.inputs[1] in integers and n.outputs[0] not in integers for n in reads):
        return graph
    constant = graph.copy()
    computed = [n for n in graph.nodes if integers.keys() >= set(n.outputs)]
    constant.nodes = [n for n in constant.nodes if not integers.keys() >= set(n.outputs)]
    constant.initializers |= {o: integers[o] for n in computed for o in n.outputs}
    return constant


def _search(graph: Graph, size: int, layout: BatchLayout, raw: bytes) -> tuple[Graph, BatchLayout]:
    """A graph of one batch size for any, proved by the file, and its layout: written node by node; where one has no
    form, or the proof fails, in the next form of a node before it."""
    state = Propagation(_with_constant_positions(graph, size), size)
    furthest, failures, proofs = 0, 0, 0
    reason = ModelError("the batch can't be made free")
    forms: list[Iterator[bool]] = [iter([True])]
    while forms and failures < _MAX_FAILURES and proofs < _MAX_PROOFS:
        try:
            if not next(forms[-1], False):
                forms.pop()
            elif len(forms) <= len(state.source.nodes):
                node = state.source.nodes[len(forms) - 1]
                forms.append(state.accept(node_forms(state, node), node))
            else:
                proofs += 1
                freed, axes = state.finish()
                file = RawFile(raw, list(axes), BatchLayout(size, layout.inputs, axes))
                _prove(freed, file, size)
                return freed, file.layout
        except ModelError as error:  # noqa: PERF203
            failures += 1
            if len(forms) > furthest:
                furthest, reason = len(forms), error
    raise reason


def _prove(freed: Graph, file: RawFile, size: int) -> None:
    """Compare a graph of any batch with the file, whose batches are run one by one.

    Raises `ModelError` if outputs differ, or samples depend on each other.
    """
    feeds = sample_feeds(freed, 2 * size + (size == 1))
    session = OnnxSession(freed.to_bytes())
    subject = f"the file is made for batches of {size}, or the samples of a batch depend on each other or their order"
    # The same samples one position further have other neighbours in the file's batches.
    for shift in range(min(size, 2)):
        rows = {name: np.roll(value, shift, 0) for name, value in feeds.items()}
        file.check(rows, session.run(rows), subject, FREE_BATCH_HINT)
