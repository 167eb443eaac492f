"""Element-wise operators of several values: arithmetic, extremes, choices, comparisons."""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import INPUT, MANY_TO_ONE, gradient_reads

gradient_reads(INPUT, "Mul", "Div", "Pow", "PRelu", "Max", "Min")

_BROADCASTING = (
    *("And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "Mod", "Or", "Where", "Xor"),
)


@channel_rule(*dict.fromkeys([*MANY_TO_ONE, *_BROADCASTING]))
def broadcast_channels(channels: Channels, node: Node) -> None:
    """Tie axes of equal length, which can only be cut together. An axis of length 1 is broadcast, and isn't tied."""
    shape = channels.shape(node.outputs[0])
    out: list[AtomRow] = []
    has_fixed = False
    for axis, size in enumerate(shape):
        rows = []
        for name in node.inputs:
            position = axis - (len(shape) - len(channels.rows[name]))
            if position >= 0 and channels.rows[name][position].size == size:
                rows.append(channels.rows[name][position])
        first = rows[0]
        for row in rows[1:]:
            channels.atoms.tie(first, row)
        has_fixed = has_fixed or bool(any(r.any() for r in rows) and any(not r.any() for r in rows))
        # Any of several tied atoms represents all; the fixed one is preferred.
        out.append(np.minimum.reduce(rows) if size > 1 else fixed_row(size))
    if has_fixed and any(channels.is_constant(name) for name in node.inputs):
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")
    channels.set_output(node, out)


@gradient_rule("Add", "Sub", "Mul", "Div")
def arithmetic(tape: Tape, node: Node) -> Pull:
    """The four binary operators with broadcasting."""
    left, right = node.inputs
    a, b = tape.value(left), tape.value(right)
    shape = tape.broadcast(node, tape.shape(left), tape.shape(right))
    g = tape.graph
    y = g.emit(node.op, a, b)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        if tape.needs_gradient(left):
            da = g.emit(node.op, dy, b) if node.op in ("Mul", "Div") else dy
            tape.add_gradient(left, tape.sum_to_shape(da, shape, tape.shape(left)))
        if not tape.needs_gradient(right):
            return
        db = dy
        if node.op == "Mul":
            db = g.emit("Mul", dy, a)
        elif node.op == "Div":
            db = g.emit("Neg", g.emit("Div", g.emit("Mul", dy, y), b))
        db = tape.sum_to_shape(db, shape, tape.shape(right))
        # Of a difference the sum is negated, which is the smaller array.
        tape.add_gradient(right, g.emit("Neg", db) if node.op == "Sub" else db)

    return pull


@gradient_rule("Sum", "Mean")
def sums(tape: Tape, node: Node) -> Pull:
    """The sum or mean of several values. Each gets dy; of a mean, dy divided by their number."""
    g, names = tape.graph, node.inputs
    shape = tape.broadcast(node, *[tape.shape(n) for n in names])
    tape.enter(node.outputs[0], g.emit(node.op, *[tape.value(n) for n in names]), shape)

    def pull(dy: str) -> None:
        share = g.emit("Mul", dy, g.scalar(1 / len(names))) if node.op == "Mean" else dy
        for name in names:
            if tape.needs_gradient(name):
                tape.add_gradient(name, tape.sum_to_shape(share, shape, tape.shape(name)))

    return pull


@gradient_rule("Max", "Min")
def extremes(tape: Tape, node: Node) -> Pull:
    """The largest or smallest of several values, which gets dy. Equal ones share it, as in PyTorch.

    A value and a single number are PyTorch's clamp: at the bound the value gets all of dy.
    """
    g, names = tape.graph, node.inputs
    shapes = [tape.shape(n) for n in names]
    y, shape = tape.value(names[0]), shapes[0]
    steps = []
    for name, operand_shape in zip(names[1:], shapes[1:], strict=True):
        left, right, left_shape = y, tape.value(name), shape
        shape = tape.broadcast(node, shape, operand_shape)
        y = g.emit(node.op, left, right)
        steps.append((name, left, right, left_shape, shape))
    # PyTorch's clamp is exported as a maximum and a minimum with a number.
    is_clamp = len(names) == 2 and any(map(tape.is_number, names))
    if not steps:
        y = g.emit("Identity", y)
    tape.enter(node.outputs[0], y, shape)
    wins = "Greater" if node.op == "Max" else "Less"

    def pull(dy: str) -> None:
        if is_clamp:
            name, bound = sorted(names, key=tape.is_number)
            inside = g.emit(f"{wins}OrEqual", tape.value(name), tape.value(bound))
            tape.add_gradient(name, g.emit("Where", inside, dy, g.scalar(0)))
            return
        for name, left, right, left_shape, step_shape in reversed(steps):
            # PyTorch splits the gradient of equal numbers evenly.
            half = g.emit("Where", g.emit("Equal", left, right), g.emit("Mul", dy, g.scalar(0.5)), g.scalar(0))
            if tape.needs_gradient(name):
                share = g.emit("Where", g.emit(wins, right, left), dy, half)
                tape.add_gradient(name, tape.sum_to_shape(share, step_shape, tape.shape(name)))
            # What is left goes on to the operands before, from the last to the first.
            dy = tape.sum_to_shape(g.emit("Where", g.emit(wins, left, right), dy, half), step_shape, left_shape)
        tape.add_gradient(names[0], dy)

    return pull


@gradient_rule("Pow")
def power(tape: Tape, node: Node) -> Pull:
    """dx = dy · p · x^(p − 1), dp = dy · y · log x. Both are 0 where the result doesn't change."""
    left, right = node.inputs
    g, x = tape.graph, tape.value(left)
    constant = tape.constant(node, 1)
    if constant is not None and constant.dtype.kind != "f":
        # ONNX allows powers of whole numbers; the gradient multiplies by them.
        p = g.constant(constant, np.float32)
        exponent: tuple[int | str, ...] = constant.shape
    else:
        p, exponent = tape.value(right), tape.shape(right)
    shape = tape.broadcast(node, tape.shape(left), exponent)
    squares = constant is not None and bool(np.all(constant == 2))
    y = g.emit("Mul", x, x) if squares and shape == tape.shape(left) else g.emit("Pow", x, p)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        if tape.needs_gradient(left):
            if squares:
                slope = g.emit("Add", x, x)
            else:
                slope = g.emit("Mul", p, g.emit("Pow", x, g.emit("Sub", p, g.scalar(1))))
                if constant is None or np.any(constant == 0):
                    slope = g.emit("Where", g.emit("Equal", p, g.scalar(0)), g.scalar(0), slope)
            tape.add_gradient(left, tape.sum_to_shape(g.emit("Mul", dy, slope), shape, tape.shape(left)))
        if tape.needs_gradient(right):
            # 0^p is 0 for every p > 0, so that it doesn't depend on p; log 0 would make it NaN.
            is_flat = g.emit("And", g.emit("Equal", x, g.scalar(0)), g.emit("GreaterOrEqual", p, g.scalar(0)))
            growth = g.emit("Where", is_flat, g.scalar(0), g.emit("Mul", y, g.emit("Log", x)))
            tape.add_gradient(right, tape.sum_to_shape(g.emit("Mul", dy, growth), shape, tape.shape(right)))

    return pull


@gradient_rule("Mod")
def remainder(tape: Tape, node: Node) -> Pull:
    """X less a multiple of the divisor, which must not train: dx = dy."""
    left, right = node.inputs
    shape = tape.broadcast(node, tape.shape(left), tape.shape(right))
    y = tape.graph.emit("Mod", tape.value(left), tape.value(right), attrs=node.attrs)
    tape.enter(node.outputs[0], y, shape)
    if tape.needs_gradient(right):
        raise ModelError(f"{describe(node)}: its divisor trains", expected="a constant divisor")
    return lambda dy: tape.add_gradient(left, tape.sum_to_shape(dy, shape, tape.shape(left)))


@gradient_rule("Where")
def choice(tape: Tape, node: Node) -> Pull:
    """The first value where the condition holds, else the second. Each gets dy where it was chosen."""
    condition, left, right = node.inputs
    shape = tape.broadcast(node, *[tape.shape(i) for i in node.inputs])
    g, chosen = tape.graph, tape.value(condition)
    tape.enter(node.outputs[0], g.emit("Where", chosen, tape.value(left), tape.value(right)), shape)

    def pull(dy: str) -> None:
        for name, options in ((left, (dy, g.scalar(0))), (right, (g.scalar(0), dy))):
            if tape.needs_gradient(name):
                share = g.emit("Where", chosen, *options)
                tape.add_gradient(name, tape.sum_to_shape(share, shape, tape.shape(name)))

    return pull


@gradient_rule("Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Xor")
def comparison(tape: Tape, node: Node) -> None:
    """Comparisons and logic: no gradient passes."""
    shape = tape.broadcast(node, *[tape.shape(i) for i in node.inputs])
    tape.enter(node.outputs[0], tape.graph.emit(node.op, *[tape.value(i) for i in node.inputs]), shape)
