"""Functions that act on each number by itself: activations, roots and exponentials, rounding, casts.

A channel rule says which channels must be cut together (it ties their *atoms*, integers that name the indices of an
axis), and which stay. A gradient rule writes the forward pass into the training graph and returns the *pull*, a
function that later writes the inputs' gradients from dy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import INPUT, ONE_TO_ONE, OUTPUT, gradient_reads
from fedprune_export.ir.opset_lowering import GELU_CUBE

gradient_reads(INPUT, "Clip", "Abs", "Log", "Erf", "Gelu", "Mish", "Softplus", "HardSigmoid", "HardSwish")
gradient_reads(OUTPUT, "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal")

_OTHER_UNARY = (
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Cos", "Cosh", "Floor", "Gelu"),
    *("IsInf", "IsNaN", "Mish", "Not", "Round", "Shrink", "Sign", "Sin", "Sinh", "Swish", "Tan"),
)

Slope = Callable[[Graph, str, str], str]  # writes the derivative at every number, given the graph, x and y

# Functions whose gradient is dy times their derivative: what it is in words, and what writes it.
_DERIVATIVES: dict[str, tuple[str, Slope]] = {
    "Sigmoid": ("dx = dy · y · (1 − y).", lambda g, x, y: g.emit("Mul", y, _one_minus(g, y))),
    "Tanh": ("dx = dy · (1 − y²).", lambda g, x, y: _one_minus(g, _square(g, y))),
    "Exp": ("dx = dy · y.", lambda g, x, y: y),
    # onnxruntime's Sigmoid rounds what is below 1e-7 to multiples of 6e-8.
    "Softplus": ("dx = dy / (1 + e^(−x)).", lambda g, x, y: _inverse(g, _one_plus(g, g.emit("Exp", g.emit("Neg", x))))),
    "Abs": ("dx = dy · sign(x).", lambda g, x, y: g.emit("Sign", x)),
    "Sin": ("dx = dy · cos(x).", lambda g, x, y: g.emit("Cos", x)),
    "Cos": ("dx = −dy · sin(x).", lambda g, x, y: g.emit("Neg", g.emit("Sin", x))),
    "Tan": ("dx = dy · (1 + y²).", lambda g, x, y: _one_plus(g, _square(g, y))),
    "Atan": ("dx = dy / (1 + x²).", lambda g, x, y: _inverse(g, _one_plus(g, _square(g, x)))),
    "Asin": ("dx = dy / √(1 − x²).", lambda g, x, y: _inverse(g, _root(g, _one_minus(g, _square(g, x))))),
    "Acos": ("dx = −dy / √(1 − x²).", lambda g, x, y: g.emit("Neg", _DERIVATIVES["Asin"][1](g, x, y))),
    "Sinh": ("dx = dy · cosh(x).", lambda g, x, y: g.emit("Cosh", x)),
    "Cosh": ("dx = dy · sinh(x).", lambda g, x, y: g.emit("Sinh", x)),
    "Asinh": ("dx = dy / √(1 + x²).", lambda g, x, y: _inverse(g, _root(g, _one_plus(g, _square(g, x))))),
    "Atanh": ("dx = dy / (1 − x²).", lambda g, x, y: _inverse(g, _one_minus(g, _square(g, x)))),
    "Acosh": ("dx = dy / √(x² − 1).", lambda g, x, y: _inverse(g, _root(g, g.emit("Sub", _square(g, x), g.scalar(1))))),
    "Reciprocal": ("dx = −dy · y².", lambda g, x, y: g.emit("Neg", _square(g, y))),
    "Erf": (
        "dx = dy · 2/√π · e^(−x²).",
        lambda g, x, y: _scale(g, g.emit("Exp", g.emit("Neg", _square(g, x))), 2 / math.sqrt(math.pi)),
    ),
    "Softsign": ("dx = dy / (1 + |x|)².", lambda g, x, y: _inverse(g, _square(g, _one_plus(g, g.emit("Abs", x))))),
}


@channel_rule(*dict.fromkeys([*ONE_TO_ONE, *_OTHER_UNARY]))
def elementwise_channels(channels: Channels, node: Node) -> None:
    """The output has the channels of the first input; bounds and other inputs stay."""
    channels.fix_inputs(node, 1)
    for i in range(len(node.outputs)):
        channels.set_output(node, channels.input_rows(node, 0), i)


# Writes dx, given the graph, the node, its input x, its output y, and dy.
Gradient = Callable[[Graph, Node, str, str, str], str]


def _emit_unary(tape: Tape, node: Node) -> tuple[str, str]:
    """Write an operator of one input as it is. Returns its input and output in the training graph."""
    x = tape.value(node.inputs[0])
    y = tape.graph.emit(node.op, x, attrs=node.attrs)
    tape.enter(node.outputs[0], y, tape.shape(node.inputs[0]))
    return x, y


def _unary(*operators: str, text: str | None = None) -> Callable[[Gradient], Gradient]:
    """Register functions of one number that are written as they are.

    `text`: describes the rule; by default the gradient's docstring does.
    """

    def register(gradient: Gradient) -> Gradient:
        def function(tape: Tape, node: Node) -> Pull:
            x, y = _emit_unary(tape, node)
            return lambda dy: tape.add_gradient(node.inputs[0], gradient(tape.graph, node, x, y, dy))

        function.__doc__ = text or gradient.__doc__
        gradient_rule(*operators)(function)
        return gradient

    return register


def _float32_attribute(node: Node, name: str, default: float) -> float:
    # onnxruntime reads the attribute as float32, and the derivative must be of the same function.
    return float(np.float32(node.attrs.get(name, default)))


def _scale(g: Graph, value: str, factor: float) -> str:
    return g.emit("Mul", value, g.scalar(factor))


def _square(g: Graph, value: str) -> str:
    return g.emit("Mul", value, value)


def _one_minus(g: Graph, value: str) -> str:
    return g.emit("Sub", g.scalar(1), value)


def _one_plus(g: Graph, value: str) -> str:
    return g.emit("Add", value, g.scalar(1))


def _inverse(g: Graph, value: str) -> str:
    return g.emit("Reciprocal", value)


def _root(g: Graph, value: str) -> str:
    return g.emit("Sqrt", value)


def _mask_gradient(g: Graph, condition: str, dy: str) -> str:
    """Dy where the condition holds, else 0."""
    return g.emit("Where", condition, dy, g.scalar(0))


def _multiply_by(slope: Slope) -> Gradient:
    return lambda g, node, x, y, dy: g.emit("Mul", dy, slope(g, x, y))


for _operator, (_text, _slope) in _DERIVATIVES.items():
    _unary(_operator, text=_text)(_multiply_by(_slope))


@_unary("Log")
def _logarithm(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = dy / x."""
    return g.emit("Div", dy, x)


@_unary("Neg")
def _negation(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = −dy."""
    return g.emit("Neg", dy)


@_unary("Sqrt")
def _square_root(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = dy / (2 · y), or 0 where y = 0, as torch does for the standard deviation of equal numbers."""
    slope = g.emit("Where", g.emit("Equal", y, g.scalar(0)), g.scalar(0), g.emit("Div", g.scalar(0.5), y))
    return g.emit("Mul", dy, slope)


@_unary("LeakyRelu")
def _leaky_relu(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = dy where x > 0, else alpha · dy."""
    scaled = _scale(g, dy, _float32_attribute(node, "alpha", 0.01))
    return g.emit("Where", g.emit("Greater", x, g.scalar(0)), dy, scaled)


@_unary("ThresholdedRelu")
def _thresholded_relu(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = dy where x > alpha."""
    return _mask_gradient(g, g.emit("Greater", x, g.scalar(_float32_attribute(node, "alpha", 1.0))), dy)


@gradient_rule("Shrink")
def shrink(tape: Tape, node: Node) -> Pull | None:
    """dx = dy where |x| > lambd; 0 where lambd and bias are 0, which is how torch's `detach` is exported."""
    name, g, threshold = node.inputs[0], tape.graph, _float32_attribute(node, "lambd", 0.5)
    if threshold == 0 == _float32_attribute(node, "bias", 0.0):
        tape.enter(node.outputs[0], tape.value(name), tape.shape(name))
        return None
    x, _ = _emit_unary(tape, node)

    def pull(dy: str) -> None:
        tape.add_gradient(name, _mask_gradient(g, g.emit("Greater", g.emit("Abs", x), g.scalar(threshold)), dy))

    return pull


@_unary("Elu", "Selu", "Celu")
def _exponential_units(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """Gamma · x above 0 and gamma · alpha · (e^(x/c) − 1) below; dx = dy · gamma, or dy · gamma · alpha/c · e^(x/c)."""
    # ONNX's own defaults, with which Selu keeps mean 0 and variance 1.
    alpha = _float32_attribute(node, "alpha", 1.67326319217681884765625 if node.op == "Selu" else 1.0)
    gamma = _float32_attribute(node, "gamma", 1.05070102214813232421875) if node.op == "Selu" else 1.0
    scale = alpha if node.op == "Celu" else 1.0
    below = g.emit("Min", x, g.scalar(0))  # e^x of large x would be infinite
    steepness = g.emit("Exp", g.emit("Div", below, g.scalar(scale)) if scale != 1 else below)
    slope = _scale(g, steepness, gamma * alpha / scale)
    above = _scale(g, dy, gamma) if gamma != 1 else dy
    return g.emit("Where", g.emit("Greater", x, g.scalar(0)), above, g.emit("Mul", dy, slope))


@_unary("HardSigmoid")
def _hard_sigmoid(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """dx = alpha · dy where 0 < y < 1."""
    inside = g.emit("And", g.emit("Greater", y, g.scalar(0)), g.emit("Less", y, g.scalar(1)))
    return _mask_gradient(g, inside, _scale(g, dy, _float32_attribute(node, "alpha", 0.2)))


@_unary("HardSwish")
def _hard_swish(g: Graph, node: Node, x: str, y: str, dy: str) -> str:
    """y = x · clip(x/6 + 1/2, 0, 1); dx = dy · (0 up to −3, 1 from 3 on, x/3 + 1/2 between)."""
    slope = g.emit("Add", _scale(g, x, 1 / 3), g.scalar(0.5))
    slope = g.emit("Where", g.emit("LessOrEqual", x, g.scalar(-3)), g.scalar(0), slope)
    slope = g.emit("Where", g.emit("GreaterOrEqual", x, g.scalar(3)), g.scalar(1), slope)
    return g.emit("Mul", dy, slope)


@gradient_rule("Identity")
def identity(tape: Tape, node: Node) -> Pull:
    """y = x."""
    name = node.inputs[0]
    tape.enter(node.outputs[0], tape.value(name), tape.shape(name))
    return lambda dy, *_: tape.add_gradient(name, dy)


# TensorProto's numbers of float32, float16, float64 and bfloat16.
_FLOATS, _FLOAT32 = {1, 10, 11, 16}, 1


@gradient_rule("Cast")
def cast(tape: Tape, node: Node) -> Pull | None:
    """Casts between floats do nothing, because all of them train as float32. Integers and booleans have no gradient."""
    name = node.inputs[0]
    x, to = tape.value(name), int(node.attrs["to"])
    if to not in _FLOATS:
        tape.enter(node.outputs[0], tape.graph.emit("Cast", x, attrs={"to": to}), tape.shape(name))
        return None
    # Data that doesn't train may come in another float type.
    y = tape.graph.emit("Cast", x, attrs={"to": _FLOAT32}) if not tape.needs_gradient(name) else x
    tape.enter(node.outputs[0], y, tape.shape(name))
    return lambda dy: tape.add_gradient(name, dy)


@gradient_rule("Relu")
def relu(tape: Tape, node: Node) -> Pull:
    """dx = dy where y > 0."""
    _, y = _emit_unary(tape, node)
    return lambda dy: tape.add_gradient(node.inputs[0], where_positive(tape, dy, y))


def where_true(tape: Tape, condition: str, dy: str) -> str:
    """Dy where a condition holds, else 0.

    If dy is finite, this is its product with 0 or 1: onnxruntime's Where makes two further arrays of its output's size
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/providers/cpu/tensor/where_op.cc).
    """
    g = tape.graph
    if tape.finite_slopes:
        return g.emit("Mul", dy, g.emit("Cast", condition, attrs={"to": 1}))
    return _mask_gradient(g, condition, dy)


def where_positive(tape: Tape, dy: str, y: str) -> str:
    """Dy where y is above 0, else 0.

    If dy is finite, its product with a mask is the same and faster than a Where. The mask is HardSigmoid of slope
    2^126: 0 up to y = 0, and 1 from the smallest normal number on.
    """
    g = tape.graph
    if tape.finite_slopes:
        return g.emit("Mul", dy, g.emit("HardSigmoid", y, attrs={"alpha": 2.0**126, "beta": 0.0}))
    return _mask_gradient(g, g.emit("Greater", y, g.scalar(0)), dy)


@gradient_rule("PRelu")
def parametric_relu(tape: Tape, node: Node) -> Pull:
    """dx = dy where x > 0, else slope · dy; dslope = Σ dy · x where x ≤ 0."""
    left, right = node.inputs
    x, slope, shape = tape.value(left), tape.value(right), tape.shape(left)
    g = tape.graph
    shape = tape.broadcast(node, shape, tape.shape(right))
    tape.enter(node.outputs[0], g.emit("PRelu", x, slope), shape)
    above = g.emit("Greater", x, g.scalar(0))

    def pull(dy: str) -> None:
        if tape.needs_gradient(left):
            tape.add_gradient(left, g.emit("Where", above, dy, g.emit("Mul", dy, slope)))
        if tape.needs_gradient(right):
            share = g.emit("Where", above, g.scalar(0), g.emit("Mul", dy, x))
            tape.add_gradient(right, tape.sum_to_shape(share, shape, tape.shape(right)))

    return pull


@gradient_rule("Gelu")
def gelu(tape: Tape, node: Node) -> Pull:
    """y = x · Φ(x), exact by the error function or approximated by tanh; dx = dy · (Φ + x · Φ′)."""
    name = node.inputs[0]
    x, g = tape.value(name), tape.graph
    if str(node.attrs.get("approximate", "none")) == "tanh":
        return _tanh_gelu(tape, node, x)
    share = _scale(g, _one_plus(g, g.emit("Erf", _scale(g, x, math.sqrt(0.5)))), 0.5)
    tape.enter(node.outputs[0], g.emit("Mul", x, share), tape.shape(name))

    def pull(dy: str) -> None:
        bell = g.emit("Exp", _scale(g, _square(g, x), -0.5))
        slope = g.emit("Add", share, g.emit("Mul", x, _scale(g, bell, 1 / math.sqrt(2 * math.pi))))
        tape.add_gradient(name, g.emit("Mul", dy, slope))

    return pull


def _tanh_gelu(tape: Tape, node: Node, x: str) -> Pull:
    """y = x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2, with 1 + tanh(u) = 2 · sigmoid(2u)."""
    g, c = tape.graph, 2 * math.sqrt(2 / math.pi)
    square = _square(g, x)
    inner = g.emit("Mul", x, g.emit("Add", _scale(g, square, c * GELU_CUBE), g.scalar(c)))
    share = g.emit("Sigmoid", inner)
    tape.enter(node.outputs[0], g.emit("Mul", x, share), tape.shape(node.inputs[0]))

    def pull(dy: str) -> None:
        steepness = g.emit("Add", _scale(g, square, 3 * c * GELU_CUBE), g.scalar(c))
        change = g.emit("Mul", g.emit("Mul", share, _one_minus(g, share)), g.emit("Mul", x, steepness))
        tape.add_gradient(node.inputs[0], g.emit("Mul", dy, g.emit("Add", share, change)))

    return pull


@gradient_rule("Mish")
def mish(tape: Tape, node: Node) -> Pull:
    """y = x · t with t = tanh(softplus(x)); dx = dy · (t + x · (1 − t²) · sigmoid(x))."""
    name = node.inputs[0]
    x, g = tape.value(name), tape.graph
    t = g.emit("Tanh", g.emit("Softplus", x))
    tape.enter(node.outputs[0], g.emit("Mul", x, t), tape.shape(name))

    def pull(dy: str) -> None:
        change = g.emit("Mul", g.emit("Mul", x, _one_minus(g, _square(g, t))), g.emit("Sigmoid", x))
        tape.add_gradient(name, g.emit("Mul", dy, g.emit("Add", t, change)))

    return pull


@gradient_rule("Clip")
def clip(tape: Tape, node: Node) -> Pull:
    """dx = dy where low < x < high, PyTorch's hardtanh (ReLU6); with one bound also at the bound, PyTorch's clamp.

    With two bounds ONNX doesn't record which of PyTorch's operators it was. The two differ only exactly at a bound.
    """
    name = node.inputs[0]
    x = tape.value(name)
    g = tape.graph
    if not tape.needs_gradient(name):
        bound_values = [tape.value(i) if i else "" for i in node.inputs[1:]]
        tape.enter(node.outputs[0], g.emit("Clip", x, *bound_values), tape.shape(name))
        return lambda dy: None
    bounds = [tape.required_constant(node, i) for i in (1, 2)]
    names = [g.scalar(float(b)) if b is not None else "" for b in bounds]
    while names and not names[-1]:
        names.pop()
    y = g.emit("Clip", x, *names)
    tape.enter(node.outputs[0], y, tape.shape(name))

    def pull(dy: str) -> None:
        if all(b is not None for b in bounds):
            # The nearer bound's distance from y, which is above 0 between them; exact at the bounds themselves.
            low, high = names
            distance = g.emit("Min", g.emit("Sub", y, low) if bounds[0] else y, g.emit("Sub", high, y))
            tape.add_gradient(name, where_positive(tape, dy, distance))
            return
        checks = zip(("GreaterOrEqual", "LessOrEqual"), names, strict=False)
        inside = [g.emit(op, x, bound) for op, bound in checks if bound]
        tape.add_gradient(name, _mask_gradient(g, inside[0], dy) if inside else dy)

    return pull


@gradient_rule("Floor", "Ceil", "Round", "Sign", "Hardmax", "IsNaN", "IsInf", "Not")
def step_functions(tape: Tape, node: Node) -> None:
    """Constant between jumps: no gradient passes."""
    if any(i and i != node.inputs[0] for i in node.inputs[1:]):
        raise ModelError(f"{describe(node)}: inputs", expected=1, got=len(node.inputs))
    _emit_unary(tape, node)
