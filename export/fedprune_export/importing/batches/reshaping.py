"""Operators that keep the order of numbers: where they take the batch, and how they are written for any batch."""

from __future__ import annotations

from fedprune_export.importing.batches.places import ADDED, Place, places_after_reshape
from fedprune_export.importing.batches.propagation import Propagation
from fedprune_export.ir.graph import Node


def reshape(state: Propagation, node: Node) -> None:
    """A node that keeps the order of numbers: the first form that gives the expected shape is written."""
    data, output = node.inputs[0], node.outputs[0]
    if data not in state.places:
        # The shape alone follows the batch.
        state.write(node)
        return
    after = state.fixed.shapes[output]
    place = _place_after(state, node)
    if place.added and state.places[data].axis:
        data = state.to_front(data)
        state.places[data] = Place(0)
    expected, before = place.freed(after, state.trial), state.places[data]
    state.places[output] = place
    if state.shapes.shapes[data] == expected:
        state.emit("Identity", data, out=output)
        return
    if not before.added and not place.added and state.attempt(node, expected):
        return
    target = state.numbers(node.inputs[1]) if node.op == "Reshape" else None
    targets = []
    if target is not None and place == before and not place.added and not node.attrs.get("allowzero"):
        targets.append([*target[: place.axis], 0, *target[place.axis + 1 :]])  # 0 copies the size
    shape = list(place.freed(after, -1)) if place.is_exact else list(after)
    shape[place.axis] = -1
    for numbers in [*targets, shape]:
        if state.attempt(Node("Reshape", [data, state.ints(*numbers)], [output], {}, node.name), expected):
            return
    state.refuse(node, f"its shape {list(after)} has no axis for the batch")


def _place_after(state: Propagation, node: Node) -> Place:
    """Where a reshape takes the batch: to an axis of its own if there is one."""
    before, after = state.fixed.shapes[node.inputs[0]], state.fixed.shapes[node.outputs[0]]
    place = state.places[node.inputs[0]]
    places = places_after_reshape(place, before, after, state.batch)
    # Axes that only hold the batch come first, then those that the reshape has split or merged.
    places.sort(key=lambda p: (not p.is_exact, p.axis != place.axis or place.added, after[p.axis] in before))
    if state.batch == 1 and (place.added or place.is_exact):
        own = sum(p.is_exact for p in places)
        places.insert(own if place.added or node.op == "Squeeze" else len(places), ADDED)
    if not places:
        state.refuse(node, f"its shape {list(after)} has no axis for the batch")
    return state.choose(places)


def squeeze(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    place, shape = state.places[data], state.fixed.shapes[data]
    axes = state.axes(node, 1, [a for a, size in enumerate(shape) if size == 1])
    if axes is None or place.added or place.axis in axes:
        reshape(state, node)
        return
    # Without axes it would also remove a batch of 1.
    state.write(Node("Squeeze", [data, state.ints(*axes)], list(node.outputs), {}, node.name))


def unsqueeze(state: Propagation, node: Node) -> None:
    place = state.places[node.inputs[0]]
    if place.added or not place.is_exact:
        reshape(state, node)
    else:
        state.write(node)
