"""The forms in which a node can be written for a free batch.

Most nodes stay as they are. Where that fits no other batch, forms are tried that are likely to mean the same; the proof
finds those that don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from fedprune_export.importing.batches.propagation import ADDED, Place, Propagation
from fedprune_export.ir.graph import Node
from fedprune_export.ir.opset_lowering import REDUCTIONS
from fedprune_export.ir.shape_inference import set_value

_REDUCTIONS = (*REDUCTIONS, "ReduceSum")

# Operators that only rearrange, and those that do nothing else along an axis of size 1, or along a whole axis.
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MOVES = (*_RESHAPES, *_REDUCTIONS, "Gather", "Slice", "Split")

# By operator, the input that holds axes; and operators whose axis is the first by default.
_AXES_INPUTS = {**dict.fromkeys((*_REDUCTIONS, "Squeeze"), 1), "Slice": 3}
_FIRST_AXIS = ("ArgMax", "ArgMin", "Gather", "GatherElements", "ScatterElements", "Split")


_Form = Callable[[Propagation, Node], Iterator[Place | None]]


def node_forms(state: Propagation, node: Node) -> Iterator[Place | None]:
    """Append a node's forms to the written graph, the most likely first; the caller removes each before the next.

    Yields the place of the batch in the output, or None where the shape shows it.
    """
    place = state.places.get(node.inputs[0]) if node.inputs else None
    if node.domain or state.places.keys().isdisjoint(node.inputs):
        forms: tuple[_Form, ...] = (_own_form,)
    elif place and (node.op == "Reshape" or (node.op == "Unsqueeze" and place.added)):
        forms = (_reshapes,)
    else:
        forms = (_own_form, _reads_in_samples, _sizes, _rows, _beside_removed, _reshapes)
    for form in forms:
        yield from form(state, node.copy())


def _own_form(state: Propagation, node: Node) -> Iterator[None]:
    """The file's; axes are counted from the end where the batch is one more axis before them."""
    data = node.inputs[0] if node.inputs else ""
    place, rank = state.places.get(data), len(state.before.get(data, ()))
    if node.domain:
        pass
    elif node.op == "Squeeze" and len(node.inputs) < 2 and place:
        # Without axes it would also remove a batch of 1.
        _set_axes(state, node, [a for a, size in enumerate(state.shapes.shapes[data]) if size == 1])
    elif node.op == "Expand" and node.inputs[1] in state.shapes.numbers and not place:
        # Of what has the file's batch already, one row is repeated.
        changed = np.flatnonzero(state.shapes.numbers[node.inputs[1]] != state.constant_value(node.inputs[1]))
        for axis in changed[changed < rank].tolist():
            node.inputs[0] = _row(state, data, axis)
    elif node.op in ("LSTM", "GRU", "RNN") and place:
        _repeat_states(state, node)
    elif place == ADDED:
        if node.op == "Transpose":
            node.attrs["perm"] = [0, *(p + 1 for p in node.attrs.get("perm", range(rank)[::-1]))]
        if "axis" in node.attrs or node.op in _FIRST_AXIS:
            node.attrs["axis"] = node.attrs.get("axis", 0) % max(rank, 1) - rank
        if node.op in _AXES_INPUTS:
            _set_axes(state, node, [a - rank for a in _axes(state, node)])
    state.graph.nodes.append(node)
    yield None


def _axes(state: Propagation, node: Node) -> list[int]:
    """The axes along which a node works, counted from 0; all without a list."""
    position, rank = _AXES_INPUTS[node.op], len(state.before[node.inputs[0]])
    listed: Iterable[int] | None = node.attrs.get("axes")
    if listed is None and len(node.inputs) > position:
        listed = state.constant_value(node.inputs[position])
    return [int(a) % max(rank, 1) for a in (range(rank) if listed is None else listed)]


def _set_axes(state: Propagation, node: Node, axes: Sequence[int]) -> None:
    if "axes" in node.attrs or (node.op in REDUCTIONS and state.graph.opset < 18):
        node.attrs["axes"] = list(axes)
    else:
        position = _AXES_INPUTS[node.op]
        node.inputs[position : position + 1] = [state.graph.ints(*axes)]


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
    if target is None or not place or place.added:
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
    fitting = {i: a for i, a in axes.items() if a >= 0 and state.before[i][a] == state.batch and not place.added}
    for is_repeated in (False, True) if fitting and place.is_exact else ():
        rows = {i: _repeated_row(state, i, a, like) if is_repeated else _row(state, i, a) for i, a in fitting.items()}
        changed = node.copy()
        changed.inputs = [rows.get(name, name) for name in node.inputs]
        state.graph.nodes.append(changed)
        yield None


def _row(state: Propagation, name: str, axis: int) -> str:
    """A value without the batch, with size 1 on an axis that has the file's batch size or 1."""
    graph, shape = state.graph, state.before[name]
    if shape[axis] == 1:
        return name
    # What the file repeats for its batch is one row already.
    maker = graph.producers().get(name, Node("", [], []))
    if maker.op == "Expand" and state.before[maker.inputs[0]] == (*shape[:axis], 1, *shape[axis + 1 :]):
        return maker.inputs[0]
    value, is_read = graph.initializers.get(name), any(name in node.inputs for node in graph.nodes)
    if value is not None and not is_read and np.array_equal(value, np.roll(value, 1, axis)):
        # It keeps its name, by which it may be listed as a parameter.
        state.narrowings.append((name, value))
        graph.initializers[name] = np.take(value, [0], axis)
        set_value(state.shapes, name, graph.initializers[name])
        return name
    return graph.emit("Slice", name, *(graph.ints(number) for number in (0, 1, axis)))


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


def _beside_removed(state: Propagation, node: Node) -> Iterator[None]:
    """Operands whose batch is one more axis: axes of 1 behind it, up to the largest rank, and a MatMul for a Gemm."""
    ranks = {i: len(state.before[i]) + (state.places.get(i, ADDED) == ADDED) for i in node.inputs if i}
    added = [i for i in ranks if state.places.get(i) == ADDED]
    if added and node.op == "Gemm":
        data, weight, *bias = node.inputs
        if node.attrs.get("transB"):
            weight = state.graph.emit("Transpose", weight, attrs={"perm": [1, 0]})
        product = state.graph.emit("MatMul", data, weight, out=None if bias else node.outputs[0])
        if bias:
            state.graph.emit("Add", product, *bias, out=node.outputs[0])
        yield None
    elif axes := {i: range(1, 1 + max(ranks.values()) - ranks[i]) for i in added if ranks[i] < max(ranks.values())}:
        names = {i: state.graph.emit("Unsqueeze", i, state.graph.ints(*missing)) for i, missing in axes.items()}
        node.inputs = [names.get(i, i) for i in node.inputs]
        state.graph.nodes.append(node)
        yield None


def _reshapes(state: Propagation, node: Node) -> Iterator[Place]:
    """What keeps the order of numbers, also along a batch of 1, as a reshape to each place that the batch can have."""
    data, graph, after = node.inputs[0], state.graph, state.before[node.outputs[0]]
    place, before, rest = state.places.get(data), state.before[data], []
    if not place or node.op not in (_MOVES if state.may_drop else _RESHAPES):
        return
    if node.op in _REDUCTIONS and not place.added:
        rest = [a for a in _axes(state, node) if a != place.axis]
        before = tuple(1 if a in rest else size for a, size in enumerate(before))
    target = state.constant_value(node.inputs[1]) if node.op == "Reshape" else None
    for new in _places_after(state, node, place, before, after):
        value = data
        if rest:
            value = graph.fresh(node.op)
            graph.nodes.append(Node(node.op, node.inputs[:1], [value], {**node.attrs, "keepdims": 1}, value))
            _set_axes(state, graph.nodes[-1], rest)
        if new.added and place.axis:
            order = [place.axis, *(a for a in range(len(before)) if a != place.axis)]
            value = graph.emit("Transpose", value, attrs={"perm": order})
        sizes = list(new.with_batch(after, -1))
        if target is not None and new == place and not new.added:
            # 0 copies the size.
            sizes = [min(size, 0) if a == new.axis else size for a, size in enumerate(target.tolist())]
        if value == data and state.shapes.shapes[data] == new.with_batch(after, state.trial):
            graph.emit("Identity", value, out=node.outputs[0])
        else:
            graph.emit("Reshape", value, graph.ints(*sizes), out=node.outputs[0])
        yield new


def _places_after(
    state: Propagation, node: Node, place: Place, before: Sequence[int], after: Sequence[int]
) -> list[Place]:
    """All places that the batch can have after a reshape, the most likely first; several if the file's batch is 1."""
    if math.prod(before) != math.prod(after):
        return []
    # A reshape keeps the order of numbers, so samples lie as far apart after it as before.
    stride = math.prod(before) if place.added else place.inner * math.prod(before[place.axis + 1 :])
    places = []
    for axis, size in enumerate(after):
        inner, rest = divmod(stride, max(math.prod(after[axis + 1 :]), 1))
        if inner and not rest and size and size % (inner * state.batch) == 0:
            places.append(Place(axis, size // (inner * state.batch), inner))
    # Axes that only hold the batch come first, then those that the reshape has split or merged.
    places.sort(key=lambda p: (not p.is_exact, p.axis != place.axis or place.added, after[p.axis] in before))
    if state.batch == 1 and (place.added or place.is_exact):
        is_last = node.op in ("Reshape", "Flatten") and not place.added
        places.insert(len(places) if is_last else sum(p.is_exact for p in places), ADDED)
    return places
