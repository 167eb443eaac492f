"""Gradient rules of element-wise operators and matrix products."""

from __future__ import annotations

import numpy as np

from fedprune.errors import ModelError
from fedprune_export.gradients.tape import Pull, Shape, Tape, describe, rule
from fedprune_export.graph import Node


def _unary(tape: Tape, node: Node) -> tuple[str, str]:
    """Write a one-input operator as it is; its input and output in the training graph."""
    x = tape.value(node.inputs[0])
    y = tape.graph.emit(node.op, x, attrs=node.attrs)
    tape.enter(node.outputs[0], y, tape.shape(node.inputs[0]))
    return x, y


@rule("Identity", "Dropout")
def identity(tape: Tape, node: Node) -> Pull:
    """y = x; an exported Dropout is one, too."""
    name = node.inputs[0]
    tape.enter(node.outputs[0], tape.value(name), tape.shape(name))
    return lambda dy, *_: tape.add(name, dy)


@rule("Relu")
def relu(tape: Tape, node: Node) -> Pull:
    """Dx = dy where y > 0."""
    _, y = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        tape.add(node.inputs[0], g.emit("Where", g.emit("Greater", y, g.scalar(0)), dy, g.scalar(0)))

    return pull


@rule("LeakyRelu")
def leaky_relu(tape: Tape, node: Node) -> Pull:
    """Dx = dy where x > 0, else alpha · dy."""
    x, _ = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        scaled = g.emit("Mul", dy, g.scalar(float(node.attrs.get("alpha", 0.01))))
        tape.add(node.inputs[0], g.emit("Where", g.emit("Greater", x, g.scalar(0)), dy, scaled))

    return pull


@rule("Clip")
def clip(tape: Tape, node: Node) -> Pull:
    """Dx = dy where low < x < high, torch's hardtanh (ReLU6); one bound alone is torch's clamp, dy at the bound, too.

    With two bounds ONNX doesn't say which of torch's operators it was. Only at exactly a bound do the two differ.
    """
    name = node.inputs[0]
    x = tape.value(name)
    bounds = [tape.number(node, i) for i in (1, 2)]
    g = tape.graph
    names = [g.scalar(float(b)) if b is not None else "" for b in bounds]
    while names and not names[-1]:
        names.pop()
    tape.enter(node.outputs[0], g.emit("Clip", x, *names), tape.shape(name))

    def pull(dy: str) -> None:
        given = [(op, bound) for op, bound in zip(("Greater", "Less"), names, strict=False) if bound]
        inside = [g.emit(op if len(given) == 2 else f"{op}OrEqual", x, bound) for op, bound in given]
        if len(inside) == 2:
            inside = [g.emit("And", *inside)]
        tape.add(name, g.emit("Where", inside[0], dy, g.scalar(0)) if inside else dy)

    return pull


@rule("Sigmoid")
def sigmoid(tape: Tape, node: Node) -> Pull:
    """Dx = dy · y · (1 − y)."""
    _, y = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        tape.add(node.inputs[0], g.emit("Mul", dy, g.emit("Mul", y, g.emit("Sub", g.scalar(1), y))))

    return pull


@rule("Tanh")
def tanh(tape: Tape, node: Node) -> Pull:
    """Dx = dy · (1 − y²)."""
    _, y = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        tape.add(node.inputs[0], g.emit("Mul", dy, g.emit("Sub", g.scalar(1), g.emit("Mul", y, y))))

    return pull


@rule("Add", "Sub", "Mul", "Div")
def arithmetic(tape: Tape, node: Node) -> Pull:
    """The four binary operators with broadcasting."""
    left, right = node.inputs
    a, b = tape.value(left), tape.value(right)
    shape = tape.broadcast(node, tape.shape(left), tape.shape(right))
    g = tape.graph
    y = g.emit(node.op, a, b)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        if tape.wants(left):
            da = {
                "Add": lambda: dy,
                "Sub": lambda: dy,
                "Mul": lambda: g.emit("Mul", dy, b),
                "Div": lambda: g.emit("Div", dy, b),
            }[node.op]()
            tape.add(left, tape.reduced(da, shape, tape.shape(left)))
        if tape.wants(right):
            if node.op == "Sub" and tape.shape(right) != shape:
                # The smaller array is negated.
                tape.add(right, g.emit("Neg", tape.reduced(dy, shape, tape.shape(right))))
                return
            db = {
                "Add": lambda: dy,
                "Sub": lambda: g.emit("Neg", dy),
                "Mul": lambda: g.emit("Mul", dy, a),
                "Div": lambda: g.emit("Neg", g.emit("Div", g.emit("Mul", dy, y), b)),
            }[node.op]()
            tape.add(right, tape.reduced(db, shape, tape.shape(right)))

    return pull


@rule("Gemm")
def gemm(tape: Tape, node: Node) -> Pull:
    """Y = alpha · A' · B' + beta · C, where ' may transpose."""
    left, right = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
    a, b = tape.value(left), tape.value(right)
    shape: Shape = (tape.shape(left)[1 if ta else 0], tape.shape(right)[0 if tb else 1])
    g = tape.graph
    inputs = [a, b] + ([tape.value(bias)] if bias else [])
    tape.enter(node.outputs[0], g.emit("Gemm", *inputs, attrs=node.attrs), shape)

    def product(p: str, q: str, tp: int, tq: int) -> str:
        return g.emit("Gemm", p, q, attrs={"alpha": alpha, "transA": tp, "transB": tq})

    def pull(dy: str) -> None:
        if tape.wants(left):
            tape.add(left, product(b, dy, tb, 1) if ta else product(dy, b, 0, 1 - tb))
        if tape.wants(right):
            tape.add(right, product(dy, a, 1, ta) if tb else product(a, dy, 1 - ta, 0))
        if bias and tape.wants(bias):
            dc = tape.reduced(dy, shape, tape.shape(bias))
            tape.add(bias, g.emit("Mul", dc, g.scalar(beta)) if beta != 1 else dc)

    return pull


@rule("MatMul")
def matmul(tape: Tape, node: Node) -> Pull:
    """Y = A · B over broadcast batch axes; A and B have at least two axes."""
    left, right = node.inputs
    a, b = tape.value(left), tape.value(right)
    sa, sb = tape.shape(left), tape.shape(right)
    if len(sa) < 2 or len(sb) < 2:
        raise ModelError(f"{describe(node)}: a vector as factor", expected="two axes or more", got=[sa, sb])
    g = tape.graph
    shape = (*tape.broadcast(node, sa[:-2], sb[:-2]), sa[-2], sb[-1])
    tape.enter(node.outputs[0], g.emit("MatMul", a, b), shape)

    def swapped(value: str, rank: int) -> str:
        order = [*range(rank - 2), rank - 1, rank - 2]
        return g.emit("Transpose", value, attrs={"perm": order})

    def folded(value: str) -> str:
        return g.emit("Flatten", value, attrs={"axis": len(shape) - 1})

    def pull(dy: str) -> None:
        if tape.wants(left):
            da = g.emit("MatMul", dy, swapped(b, len(sb)))
            tape.add(left, tape.reduced(da, (*shape[:-2], *sa[-2:]), sa))
        if tape.wants(right):
            if len(sb) == 2 and len(sa) == len(shape):
                # One product over all leading axes: far less work than one per position, summed.
                tape.add(right, g.emit("Gemm", folded(a), folded(dy), attrs={"transA": 1}))
                return
            db = g.emit("MatMul", swapped(a, len(sa)), dy)
            tape.add(right, tape.reduced(db, (*shape[:-2], *sb[-2:]), sb))

    return pull


@rule("Sqrt")
def square_root(tape: Tape, node: Node) -> Pull:
    """Dx = dy / (2 · y)."""
    _, y = _unary(tape, node)
    g = tape.graph
    return lambda dy: tape.add(node.inputs[0], g.emit("Div", g.emit("Mul", dy, g.scalar(0.5)), y))


@rule("Neg")
def negation(tape: Tape, node: Node) -> Pull:
    """Dx = −dy."""
    _unary(tape, node)
    return lambda dy: tape.add(node.inputs[0], tape.graph.emit("Neg", dy))


@rule("HardSigmoid")
def hard_sigmoid(tape: Tape, node: Node) -> Pull:
    """Dx = alpha · dy where 0 < y < 1."""
    _, y = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        inside = g.emit("And", g.emit("Greater", y, g.scalar(0)), g.emit("Less", y, g.scalar(1)))
        slope = g.emit("Mul", dy, g.scalar(float(np.float32(node.attrs.get("alpha", 0.2)))))
        tape.add(node.inputs[0], g.emit("Where", inside, slope, g.scalar(0)))

    return pull


@rule("HardSwish")
def hard_swish(tape: Tape, node: Node) -> Pull:
    """Y = x · clip(x/6 + 1/2, 0, 1); dx = dy · (0 up to −3, 1 from 3 on, x/3 + 1/2 between)."""
    x, _ = _unary(tape, node)
    g = tape.graph

    def pull(dy: str) -> None:
        slope = g.emit("Add", g.emit("Mul", x, g.scalar(1 / 3)), g.scalar(0.5))
        slope = g.emit("Where", g.emit("LessOrEqual", x, g.scalar(-3)), g.scalar(0), slope)
        slope = g.emit("Where", g.emit("GreaterOrEqual", x, g.scalar(3)), g.scalar(1), slope)
        tape.add(node.inputs[0], g.emit("Mul", dy, slope))

    return pull
