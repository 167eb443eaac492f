"""The forms in which a node can be written for a free batch.

Most nodes stay as they are. Where that fits no other batch, forms are tried that are likely to mean the same; the proof
finds those that don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedprune_export.importing.batches.propagation import Place, Propagation
from fedprune_export.ir.graph import Node

_Form = Callable[[Propagation, Node], Iterator[Place | None]]


def node_forms(state: Propagation, node: Node) -> Iterator[Place | None]:
    """Append a node's forms to the written graph, the most likely first; the caller removes each before the next.

    Yields the place of the batch in the output, or None where the shape shows it.
    """
    if state.places.keys().isdisjoint(node.inputs):
        forms: tuple[_Form, ...] = (_own_form,)
    elif node.op == "Reshape" and node.inputs[0] in state.places:
        forms = (_reshapes,)
    else:
        forms = (_own_form, _reads_in_samples, _sizes, _rows, _reshapes, _squeeze_without_batch)
    for form in forms:
        yield from form(state, node.copy())


def _own_form(state: Propagation, node: Node) -> Iterator[None]:
    """The file's, without what fixes the batch."""
    place = state.places.get(node.inputs[0]) if node.inputs else None
    if node.op == "Squeeze" and place and len(node.inputs) < 2:
        _squeeze_others(state, node, place)
    elif node.op in ("LSTM", "GRU", "RNN") and place:
        _repeat_states(state, node)
    state.graph.nodes.append(node)
    yield None


def _squeeze_without_batch(state: Propagation, node: Node) -> Iterator[None]:
    """A Squeeze of the batch, which keeps its axis, since no other axis of size 1 can hold it."""
    if node.op == "Squeeze" and (place := state.places.get(node.inputs[0])):
        _squeeze_others(state, node, place)
        state.graph.nodes.append(node)
        yield None


def _squeeze_others(state: Propagation, node: Node, place: Place) -> None:
    """Squeeze all axes but the batch's. Without axes it would remove a batch of 1, too."""
    shape = state.before[node.inputs[0]]
    axes = state.constant_value(node.inputs[1]) if len(node.inputs) > 1 else np.flatnonzero(np.array(shape) == 1)
    listed = [] if axes is None else [int(a) % len(shape) for a in axes]
    others = [a for a in listed if a != place.axis]
    if others:
        node.inputs[1:] = [state.graph.ints(*others)]
    else:  # a Squeeze of no axes is one of all
        node.op, node.inputs = "Identity", node.inputs[:1]


def _repeat_states(state: Propagation, node: Node) -> None:
    """Leave out initial states of zeros; repeat any other for each sample."""
    for position, name in enumerate(node.inputs[5:7], 5):
        value = state.shapes.numbers.get(name) if name in state.places else state.constant_value(name)
        if value is not None and not np.any(value):
            node.inputs[position] = ""
        elif value is not None and name not in state.places:
            axis = 0 if node.attrs.get("layout") else 1
            node.inputs[position] = _repeated_row(state, name, axis, node.inputs[0])


def _reads_in_samples(state: Propagation, node: Node) -> Iterator[None]:
    """Reads at the same positions in each sample, [sample, position] or in a row of all samples, as masks are read."""
    data, is_row = node.inputs[0], node.op == "Gather"
    place, shape = state.places.get(data), state.before[data]
    if node.op not in ("Gather", "GatherND") or not place or place.axis or node.attrs.get("axis", 0):
        return
    positions = state.constant_value(node.inputs[1])
    if positions is None or positions.shape[:1] != (state.batch,) or place.is_exact == is_row:
        return
    if not is_row and positions.shape[-1] != 2:
        return
    rows = state.graph.emit("Reshape", data, state.graph.ints(-1, place.inner, *shape[1:])) if is_row else data
    inside = state.graph.constant(positions[0] if is_row else positions[0, ..., 1], np.int64)
    state.graph.emit("Gather", rows, inside, attrs={"axis": 1}, out=node.outputs[0])
    yield None


def _sizes(state: Propagation, node: Node) -> Iterator[None]:
    """A target that holds the batch's size: an Expand keeps it where the target is 1; a Resize gets its input's."""
    data, position = node.inputs[0], {"Expand": 1, "Resize": 3}.get(node.op, len(node.inputs))
    target = state.constant_value(node.inputs[position]) if position < len(node.inputs) else None
    place = state.places.get(data)
    if target is None or not place:
        return
    axis = place.axis + len(target) - len(state.before[data])
    size = state.graph.ints(1) if node.op == "Expand" else _size_of_batch(state, data)
    parts = [state.graph.ints(*target[:axis].tolist()), size, state.graph.ints(*target[axis + 1 :].tolist())]
    node.inputs[position] = state.graph.emit("Concat", *parts, attrs={"axis": 0})
    state.graph.nodes.append(node)
    yield None


def _rows(state: Propagation, node: Node) -> Iterator[None]:
    """Operands without the batch: one row for all samples, or a row for each where nothing is broadcast."""
    like = next(name for name in node.inputs if name in state.places)
    place, end = state.places[like], len(state.before[like])
    axes = {i: place.axis + len(state.before[i]) - end for i in node.inputs if i and i not in state.places}
    fitting = {i: a for i, a in axes.items() if a >= 0 and state.before[i][a] == state.batch}
    for is_repeated in (False, True) if fitting and place.is_exact else ():
        rows = {i: _repeated_row(state, i, a, like) if is_repeated else _row(state, i, a) for i, a in fitting.items()}
        changed = node.copy()
        changed.inputs = [rows.get(name, name) for name in node.inputs]
        state.graph.nodes.append(changed)
        yield None


def _row(state: Propagation, name: str, axis: int) -> str:
    """A value without the batch, with size 1 on an axis that has the file's batch size or 1."""
    if state.before[name][axis] == 1:
        return name
    return state.graph.emit("Slice", name, *(state.graph.ints(number) for number in (0, 1, axis)))


def _repeated_row(state: Propagation, name: str, axis: int, like: str) -> str:
    """A value without the batch, repeated for each sample along an axis."""
    ones = state.graph.ints(*[1] * (len(state.before[name]) - axis - 1))
    target = state.graph.emit("Concat", _size_of_batch(state, like), ones, attrs={"axis": 0})
    return state.graph.emit("Expand", _row(state, name, axis), target)


def _size_of_batch(state: Propagation, name: str) -> str:
    """The size of the axis that holds the batch, as a vector of one number."""
    axis = state.places[name].axis
    bounds = (state.graph.ints(number) for number in (axis, axis + 1, 0))
    return state.graph.emit("Slice", state.graph.emit("Shape", name), *bounds)


def _reshapes(state: Propagation, node: Node) -> Iterator[Place]:
    """What keeps the order of numbers, as a reshape to each place that the batch can have."""
    data, graph = node.inputs[0], state.graph
    place = state.places.get(data)
    if not place or node.op not in ("Reshape", "Flatten", "Squeeze"):
        return
    before, after = state.before[data], state.before[node.outputs[0]]
    target = state.constant_value(node.inputs[1]) if node.op == "Reshape" else None
    places = _places_after(state.batch, place, before, after)
    for new in [p for p in places if p.is_exact or node.op != "Squeeze"]:
        sizes = [-1 if axis == new.axis else size for axis, size in enumerate(after)]
        if target is not None and new == place:
            # 0 copies the size.
            sizes = [min(size, 0) if axis == new.axis else size for axis, size in enumerate(target.tolist())]
        if (new, after) == (place, before):
            graph.emit("Identity", data, out=node.outputs[0])
        else:
            graph.emit("Reshape", data, graph.ints(*sizes), out=node.outputs[0])
        yield new


def _places_after(batch: int, place: Place, before: Sequence[int], after: Sequence[int]) -> list[Place]:
    """All places that the batch can have after a reshape, the most likely first; several if the file's batch is 1."""
    # A reshape keeps the order of numbers, so samples lie as far apart after it as before.
    stride = place.inner * math.prod(before[place.axis + 1 :])
    places = []
    for axis, size in enumerate(after):
        inner, rest = divmod(stride, max(math.prod(after[axis + 1 :]), 1))
        if inner and not rest and size and size % (inner * batch) == 0:
            places.append(Place(axis, size // (inner * batch), inner))
    # Axes that only hold the batch come first, then those that the reshape has split or merged.
    return sorted(places, key=lambda p: (not p.is_exact, p.axis != place.axis, after[p.axis] in before))
