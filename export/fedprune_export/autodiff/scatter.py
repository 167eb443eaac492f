"""Gradient rules of operators that write elements into others, mask them, or turn places into vectors."""

from __future__ import annotations

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Pull, Tape, describe, rule
from fedprune_export.ir.graph import Node


@rule("ScatterND", "ScatterElements")
def scatter(tape: Tape, node: Node) -> Pull:
    """Updates written or added at places; they get dy from there, the data gets it elsewhere, or everywhere."""
    data, index, updates = node.inputs
    x, places, new = (tape.value(n) for n in node.inputs)
    reduction = str(node.attrs.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise ModelError(f"{describe(node)}: how it scatters", expected=["none", "add"], got=reduction)
    if node.op == "ScatterElements":
        axis = int(node.attrs.get("axis", 0)) % len(tape.shape(data))
        tape.static(node, [tape.shape(data)[axis]])
        where = {"axis": axis}
    else:
        depth = tape.shape(index)[-1]
        tape.static(node, [depth, *tape.shape(data)[: depth if isinstance(depth, int) else 0]])
        where = {}
    g = tape.graph
    tape.enter(node.outputs[0], g.emit(node.op, x, places, new, attrs=node.attrs), tape.shape(data))

    def pull(dy: str) -> None:
        if tape.wants(data):
            zeros = g.emit("ConstantOfShape", tape.shape_of(new))
            tape.add(data, dy if reduction == "add" else g.emit(node.op, dy, places, zeros, attrs=where))
        if tape.wants(updates):
            read = "GatherElements" if node.op == "ScatterElements" else "GatherND"
            tape.add(updates, g.emit(read, dy, places, attrs=where))

    return pull


@rule("Trilu")
def triangle(tape: Tape, node: Node) -> Pull:
    """A triangle of each matrix, zeros beside it; dy in the same triangle."""
    name, g = node.inputs[0], tape.graph
    offset = [tape.value(i) for i in node.inputs[1:] if i]
    tape.enter(node.outputs[0], g.emit("Trilu", tape.value(name), *offset, attrs=node.attrs), tape.shape(name))
    return lambda dy: tape.add(name, g.emit("Trilu", dy, *offset, attrs=node.attrs))


@rule("OneHot")
def one_hot(tape: Tape, node: Node) -> None:
    """A vector per place: no gradient passes."""
    name = node.inputs[0]
    depth = tape.number(node, 1)
    if depth is None:
        raise ModelError(f"{describe(node)}: no depth")
    shape = tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % (len(shape) + 1)
    y = tape.graph.emit("OneHot", *[tape.value(i) for i in node.inputs], attrs={"axis": axis})
    tape.enter(node.outputs[0], y, (*shape[:axis], int(depth.reshape(-1)[0]), *shape[axis:]))
