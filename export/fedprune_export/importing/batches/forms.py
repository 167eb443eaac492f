"""Forms that several rules of a free batch share."""

from __future__ import annotations

from collections.abc import Callable

from fedprune_export.importing.batches.propagation import ADDED, Propagation
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import ONE_TO_ONE

Rule = Callable[[Propagation, Node], None]

# Operators that compute each number from one number, or along an axis counted from the end.
_POSITIONWISE = frozenset(ONE_TO_ONE) | {
    *("Not", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Gelu", "Mish", "IsNaN", "IsInf", "CastLike"),
    *("Shape", "Size"),
}


def plain(state: Propagation, node: Node) -> None:
    if node.op not in _POSITIONWISE and any(state.places.get(i) == ADDED for i in node.inputs):
        state.refuse(node, "the file has removed the axis of the batch before it")
    state.write(node)


def axis_of(state: Propagation, node: Node, default: int, position: int = 0) -> int:
    """The axis in a node's attribute, counted from 0 in the file's value."""
    return int(node.attrs.get("axis", default)) % max(state.rank(node.inputs[position]), 1)


def along_axis(default: int, *, to_end: bool = False) -> Rule:
    """An operator along an axis, or along all axes from it on (`to_end`)."""

    def rule(state: Propagation, node: Node) -> None:
        place = state.places.get(node.inputs[0])
        if place is not None:
            axis = axis_of(state, node, default)
            if place.added:
                node.attrs["axis"] = axis + 1
            elif axis == place.axis or (to_end and axis < place.axis):
                state.refuse(node, "it works along the axis of the batch")
        state.write(node)

    return rule


def own_axis(state: Propagation, node: Node, value: str, axis: int) -> None:
    """End a node whose file has removed a batch of 1: the batch becomes the first axis of its output."""
    order = [axis, *(a for a in range(len(state.shapes.shapes[value])) if a != axis)]
    if axis:
        state.emit("Transpose", value, perm=order, out=node.outputs[0])
    else:
        state.emit("Identity", value, out=node.outputs[0])
    state.places[node.outputs[0]] = ADDED
