"""Element-wise operators, poolings, sums over maps and updates of weights: in blocks where their inputs are."""

from __future__ import annotations

import math

import numpy as np

from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.autodiff.intents import POOL_GRADIENT, RECTIFIED, SCALED_SUM
from fedprune_export.autodiff.rules.elementwise import STEEP, between, where_positive
from fedprune_export.autodiff.rules.pooling import tiled_gradient
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED
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
        alone = to.only_reader(one) is node and layouts.deferred(one) is None
        both = layouts.in_blocks(one) and layouts.in_blocks(other)
        if alone and both and layouts.absorb(one, add=layouts.blocked(other)):
            layouts.put(node.outputs[0], layouts.blocked(one))
            return True
    return False


@rule("MaxPool")
def max_pool(to: Formulator, node: Node) -> bool:
    """A maximum over windows, which onnxruntime also has in blocks."""
    name, layouts = node.inputs[0], to.layouts
    if len(node.outputs) > 1 or not layouts.in_blocks(name) or layouts.image(node.outputs[0]) is None:
        return False
    attrs = {k: v for k, v in node.attrs.items() if k in ("kernel_shape", "strides", "pads", "dilations")}
    layouts.put(node.outputs[0], to.graph.emit("MaxPool", layouts.blocked(name), attrs=attrs, domain=BLOCKED))
    return True


@rule(POOL_GRADIENT)
def pool_gradient(to: Formulator, node: Node) -> bool:
    """The gradient of a maximum goes to its first place."""
    layouts, out, w = to.layouts, node.outputs[0], node.attrs["window"]
    layouts.shapes[out] = layouts.shapes[node.inputs[1]]
    if layouts.in_blocks(node.inputs[1]):
        layouts.put(out, _in_blocks(to, w, *map(layouts.blocked, node.inputs)))
    else:
        dy, x, y = map(layouts.plain, node.inputs)
        to.name(tiled_gradient(to.graph, w, x, y, dy), out)
    return True


def _in_blocks(to: Formulator, w: Window, dy: str, x: str, y: str) -> str:
    """`tiled_gradient` with masks of numbers instead of truth values: operators on these share out among threads.

    Steep lines are the comparisons: 1 where nothing is missing to the maximum, 0 where anything is.
    """
    g, b = to.graph, to.layouts.block
    marks = np.tile(np.arange(math.prod(w.kernel), 0, -1, dtype=np.float32).reshape(w.kernel), w.output)
    each = g.constant(np.repeat(marks.reshape(-1), b), np.float32)  # the same for all channels of a block

    def up(value: str) -> str:
        attrs = {"scales": [1, 1, *w.kernel], "mode": "nearest"}
        return g.emit("Upsample", value, attrs=attrs, domain=BLOCKED)

    def reached(value: str, best: str) -> str:
        return g.emit("HardSigmoid", g.emit("Sub", value, up(best)), attrs={"alpha": STEEP, "beta": 1.0})

    rows = g.emit("Reshape", reached(x, y), g.ints(-1, marks.size * b))
    shape = g.ints(to.layouts.batch, -1, *w.sizes)
    mark = g.emit("Reshape", g.emit("Mul", rows, each), shape)
    best = g.emit("MaxPool", mark, attrs={"kernel_shape": list(w.kernel), "strides": list(w.strides)}, domain=BLOCKED)
    return g.emit("Mul", reached(mark, best), up(dy))


@rule("ReduceSum")
def reduce_sum(to: Formulator, node: Node) -> bool:
    """The sum over everything but the channels, as biases have it."""
    name, layouts = node.inputs[0], to.layouts
    axes = to.graph.initializers.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.tolist() != [0, 2, 3] or node.attrs.get("keepdims", 1) or layouts.image(name) is None:
        return False
    to.name(layouts.summed(name), node.outputs[0])
    return True


_LARGE = 4096
"""Numbers of a tensor from which on it is worth it."""

_ROWS = 64
"""Rows into which a tensor is laid at most: threads share them out."""


@rule(SCALED_SUM)
def scaled_sum(to: Formulator, node: Node) -> bool:
    """A + b · number: a convolution of 1×1 over b, one channel to one, that adds a."""
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    shape = [d for d in layouts.shapes.get(node.inputs[0], ()) if isinstance(d, int)]
    size, b = math.prod(shape), layouts.block
    first, second, factor = (layouts.plain(n) for n in node.inputs)
    if not to.forms.block or size % b or size < _LARGE:
        g.emit("Add", first, g.emit("Mul", second, factor), out=out)
        return True
    rows = math.gcd(size // b, _ROWS)
    laid = g.ints(1, b, rows, size // b // rows)
    kernel = _kernel(to, factor)
    ones = [1, 1]
    attrs = {"kernel_shape": ones, "strides": ones, "dilations": ones, "pads": [0] * 4, "group": b}
    laid_out = [g.emit("Reshape", v, laid) for v in (first, second)]
    total = g.emit("Conv", laid_out[1], kernel, "", laid_out[0], attrs=attrs, domain=BLOCKED)
    g.emit("Reshape", total, g.ints(*shape), out=out)
    return True


def _kernel(to: Formulator, factor: str) -> str:
    """A number as the kernel of every channel of a block; all sums with this number have the same."""
    name = f"{factor}::kernel"
    if name not in to.state:
        g = to.graph
        number = g.emit("Reshape", factor, g.ints(1, 1, 1, 1))
        to.state[name] = g.emit("Expand", number, g.ints(to.layouts.block, 1, 1, 1))
    return str(to.state[name])
