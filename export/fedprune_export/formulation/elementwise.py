"""Operators that act on each number by itself stay in the layout in which their values are."""

from __future__ import annotations

from fedprune_export.autodiff.intents import RECTIFIED
from fedprune_export.autodiff.rules.elementwise import between, where_positive
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.ir.graph import Node

_TRUTHS = frozenset({"Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "And", "Or", "Not"})


@rule("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Sign", "Exp", "Sqrt", "Clip", "Cast", "HardSigmoid", "Not", "LeakyRelu")
def unary(to: Formulator, node: Node) -> bool:
    """One value in, one of the same shape out; further inputs are numbers."""
    name, *numbers = node.inputs
    layouts = to.layouts
    if name in layouts.shapes:
        layouts.shapes[node.outputs[0]] = layouts.shapes[name]
    if node.op in _TRUTHS or (node.op == "Cast" and node.attrs.get("to") == 9):
        layouts.mask(node.outputs[0])
    if not layouts.in_blocks(name) or (node.op == "Cast" and node.attrs.get("to") not in (1, 9)):
        return False
    if node.op == "Sqrt" and layouts.sizes(name)[0] % layouts.block:
        return False  # what fills blocks up may be below 0, and not a number times 0 isn't 0
    inputs = [layouts.blocked(name), *[layouts.plain(n) if n else n for n in numbers]]
    layouts.put(node.outputs[0], to.graph.emit(node.op, *inputs, attrs=node.attrs))
    return True


@rule(
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Max",
    "Min",
    "Greater",
    "Less",
    "GreaterOrEqual",
    "LessOrEqual",
    "Equal",
    "Where",
    "And",
)
def broadcast(to: Formulator, node: Node) -> bool:
    """Values of one shape, numbers, and vectors with one number per channel."""
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    if node.op in _TRUTHS:
        layouts.mask(out)
    shapes = [layouts.shapes.get(i) for i in node.inputs]
    whole = next((s for s in shapes if s is not None and len(s) == 4 and s[2:] != (1, 1)), None)
    if whole is None or any(s is None for s in shapes):
        return False
    layouts.shapes[out] = whole
    image = layouts.image(out)
    if image is None or not any(layouts.in_blocks(i) for i in node.inputs):
        return False
    channels, height, width = image
    kinds = [_kind(s or (), whole) for s in shapes]
    if "" in kinds or (node.op == "Div" and kinds[1] != "number"):  # what fills blocks up would be divided by zero
        return False
    if "vector" not in kinds:
        if node.op == "Add" and kinds == ["whole", "whole"] and _absorbed(to, node):
            return True
        inputs = [
            layouts.blocked(i) if k == "whole" else layouts.plain(i) for i, k in zip(node.inputs, kinds, strict=True)
        ]
        layouts.put(out, g.emit(node.op, *inputs, attrs=node.attrs))
        return True
    blocks = layouts.filled(channels) // layouts.block
    parts = []
    for name, kind in zip(node.inputs, kinds, strict=True):
        if kind == "whole":
            parts.append(layouts.rows(name))
        elif kind == "vector":
            vector = layouts.vector(g.emit("Reshape", layouts.plain(name), g.ints(channels)), channels)
            parts.append(g.emit("Reshape", vector, g.ints(blocks, 1, layouts.block)))
        else:
            parts.append(layouts.plain(name))
    rows = g.emit(node.op, *parts, attrs=node.attrs)
    layouts.put(out, g.emit("Reshape", rows, g.ints(-1, blocks * layouts.block, height, width)))
    return True


@rule(RECTIFIED)
def rectified_gradient(to: Formulator, node: Node) -> bool:
    """Dy where y > 0 or between bounds, in the layout of y."""
    dy, y = node.inputs
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    layouts.shapes[out] = layouts.shapes.get(y, ())
    blocked, bounds = layouts.in_blocks(y), node.attrs.get("bounds")
    slope, value = (layouts.blocked(n) if blocked else layouts.plain(n) for n in (dy, y))
    if bounds:
        result = between(g, slope, value, *bounds)
    else:
        result = where_positive(g, slope, value, finite=bool(node.attrs["finite"]))
    if blocked:
        layouts.put(out, result)
    else:
        to.name(result, out)
    return True


def _kind(shape: tuple[int | str, ...], whole: tuple[int | str, ...]) -> str:
    """What an operand is: the whole value, a number, a vector over channels, or nothing of these."""
    if shape == whole:
        return "whole"
    if all(d == 1 for d in shape):
        return "number"
    over_channels = len(shape) >= 3 and shape[-3:] == (whole[1], 1, 1) and all(d == 1 for d in shape[:-3])
    return "vector" if over_channels else ""


def _absorbed(to: Formulator, node: Node) -> bool:
    """A sum with what a convolution makes, which the convolution adds by itself."""
    layouts = to.layouts
    for one, other in (node.inputs, node.inputs[::-1]):
        alone = to.only_reader(one) is node and layouts.owed(one) is None
        both = layouts.in_blocks(one) and layouts.in_blocks(other)
        if alone and both and layouts.absorb(one, add=layouts.blocked(other)):
            layouts.put(node.outputs[0], layouts.blocked(one))
            return True
    return False
