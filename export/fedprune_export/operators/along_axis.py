"""Operators that go along an axis and keep it: running sums, and the largest elements."""

from __future__ import annotations

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.scattered_gradients import scatter_add
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node


@channel_rule("CumSum", "TopK")
def along_one_axis_channels(channels: Channels, node: Node) -> None:
    """Channels along the axis that is accumulated or sorted stay; other axes pass."""
    x = list(channels.input_rows(node, 0))
    if node.op == "TopK":
        axis: int | None = int(node.attrs.get("axis", -1))
    else:
        number = channels.constant_input(node, 1)
        axis = int(number[0]) if number is not None else None
    axes = set(range(len(x))) if axis is None else {axis % len(x)}
    if any(x[a].any() for a in axes):
        channels.notes.append(f"{node.op} {node.name} works along channels: they stay.")
    channels.fix([x[a] for a in axes])
    for i, name in enumerate(node.outputs):
        if name:
            shape = channels.shape(name)
            channels.set_output(node, [fixed_row(shape[a]) if a in axes else row for a, row in enumerate(x)], i)


@gradient_rule("CumSum")
def running_sum(tape: Tape, node: Node) -> Pull:
    """A running sum along an axis; the gradient is the running sum from the other end."""
    name, g = node.inputs[0], tape.graph
    axis = tape.required_constant(node, 1)
    if axis is None:
        raise ModelError(f"{describe(node)}: no axis")
    axis_name = g.constant(int(axis.reshape(-1)[0]), "int64")
    tape.enter(node.outputs[0], g.emit("CumSum", tape.value(name), axis_name, attrs=node.attrs), tape.shape(name))
    back = {**node.attrs, "reverse": 1 - int(node.attrs.get("reverse", 0))}
    return lambda dy: tape.add_gradient(name, g.emit("CumSum", dy, axis_name, attrs=back))


@gradient_rule("TopK")
def top_k(tape: Tape, node: Node) -> Pull:
    """The largest or smallest elements along a fixed axis; each gradient goes back to the element's index."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % len(shape)
    count = tape.required_constant(node, 1)
    if count is None:
        raise ModelError(f"{describe(node)}: no count")
    # How many are the largest is a fixed number, so their axis has to be fixed, too.
    tape.static(node, [shape[axis]])
    g, k = tape.graph, int(count.reshape(-1)[0])
    values, indices = g.emit_many("TopK", x, g.ints(k), outputs=2, attrs=node.attrs)
    out = (*shape[:axis], k, *shape[axis + 1 :])
    for output, value in zip(node.outputs, (values, indices), strict=False):
        if output:
            tape.enter(output, value, out)

    def pull(dy: str | None, *_: object) -> None:
        if dy:
            tape.add_gradient(name, scatter_add(tape, x, indices, dy, axis))

    return pull
