"""Softmax and normalisations of each sample over its last axes (layer, RMS and Lp norms).

Statistics are computed from centred values, so that a mean far from zero costs no precision. If a statistic runs over
channels, its element count is computed at run time.
"""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.batch_statistics import inverse_deviation
from fedprune_export.autodiff.element_counts import divide_by_size, sum_axes
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import INPUT, OUTPUT, gradient_reads
from fedprune_export.operators.norm_vectors import tie_vectors

gradient_reads(INPUT, "LayerNormalization", "RMSNormalization")
gradient_reads(OUTPUT, "Softmax", "LogSoftmax")


@channel_rule("LayerNormalization", "RMSNormalization")
def layer_norm_channels(channels: Channels, node: Node) -> None:
    """Tie scale and shift to the last axes, over which the norm averages."""
    x = channels.input_rows(node, 0)
    axis = int(node.attrs.get("axis", -1)) % len(x)
    tie_vectors(channels, node, x[axis:])
    channels.set_output(node, x)
    for i in range(1, len(node.outputs)):
        if node.outputs[i]:
            channels.set_output(node, [*x[:axis], *(np.zeros(1, np.int64) for _ in x[axis:])], i)


@channel_rule("LpNormalization", "Softmax", "LogSoftmax", "Hardmax")
def softmax_channels(channels: Channels, node: Node) -> None:
    """The axis along which numbers are compared or summed stays; the others pass."""
    x = list(channels.input_rows(node, 0))
    axis = int(node.attrs.get("axis", -1)) % len(x)
    if x[axis].any():
        channels.notes.append(f"{node.op} {node.name} compares or averages channels: they stay.")
    channels.atoms.fix(x[axis])
    x[axis] = np.zeros_like(x[axis])
    channels.set_output(node, x)


@gradient_rule("Softmax", "LogSoftmax")
def softmax(tape: Tape, node: Node) -> Pull:
    """dx = y · (dy − Σ dy · y) along the axis; of the logarithm dx = dy − e^y · Σ dy."""
    name, g = node.inputs[0], tape.graph
    shape = tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % len(shape)
    y = g.emit(node.op, tape.value(name), attrs={**node.attrs, "axis": axis})
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        dz, factor = (g.emit("Mul", dy, y), y) if node.op == "Softmax" else (dy, g.emit("Exp", y))
        rest = g.emit("Mul", factor, sum_axes(g, dz, [axis]))
        tape.add_gradient(name, g.emit("Sub", dz, rest))

    return pull


@gradient_rule("LayerNormalization", "RMSNormalization")
def layer_norm(tape: Tape, node: Node) -> Pull:
    """Normalise over the last axes, less the mean or not, and scale and shift: dx = s · (dz − mean dz − z · mean dz·z).

    If channels are among the axes, the number of elements is computed at run time.
    """
    name, gamma, beta = [*node.inputs, ""][:3]
    if any(node.outputs[1:]):
        raise ModelError(f"{describe(node)}: its statistics are used", expected="one output")
    x, shape = tape.value(name), tape.shape(name)
    g, rank, is_centred = tape.graph, len(shape), node.op == "LayerNormalization"
    axis = int(node.attrs.get("axis", -1)) % rank
    axes, epsilon = list(range(axis, rank)), float(node.attrs.get("epsilon", 1e-5))
    scale, mean = tape.fit_to_width(node, 1, shape[axis:]), {"axes": axes, "keepdims": 1}
    if is_centred:
        # The operator's own statistics lose digits where the mean is large; of centred values they are exact.
        centred = g.emit("Sub", x, g.emit("ReduceMean", x, attrs=mean))
        inputs = [centred, scale] + ([tape.fit_to_width(node, 2, shape[axis:])] if beta else [])
        attrs = {"axis": axis, "epsilon": epsilon}
        y, rest, inverse = g.emit_many("LayerNormalization", *inputs, outputs=3, attrs=attrs)
    else:
        inverse = inverse_deviation(g, g.emit("ReduceMean", g.emit("Mul", x, x), attrs=mean), epsilon)
        normalised = g.emit("Mul", x, inverse)
        y = g.emit("Mul", normalised, scale)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        z = g.emit("Mul", g.emit("Sub", centred, rest), inverse) if is_centred else normalised
        if tape.needs_gradient(gamma):
            tape.add_gradient(gamma, tape.sum_to_shape(g.emit("Mul", dy, z), shape, tape.shape(gamma)))
        if beta and tape.needs_gradient(beta):
            tape.add_gradient(beta, tape.sum_to_shape(dy, shape, tape.shape(beta)))
        if tape.needs_gradient(name):
            dz = g.emit("Mul", dy, scale)
            change = g.emit("Sub", dz, mean_over_axes(dz)) if is_centred else dz
            change = g.emit("Sub", change, g.emit("Mul", z, mean_over_axes(g.emit("Mul", dz, z))))
            tape.add_gradient(name, g.emit("Mul", change, inverse))

    def mean_over_axes(value: str) -> str:
        return divide_by_size(tape, sum_axes(g, value, axes), shape[axis:])

    return pull


@gradient_rule("LpNormalization")
def lp_norm(tape: Tape, node: Node) -> Pull:
    """X divided by its length (p = 2) or sum of absolutes (p = 1) along an axis; 0 stays 0."""
    name, g = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    axis, order = int(node.attrs.get("axis", -1)) % len(shape), int(node.attrs.get("p", 2))
    size = g.emit(f"ReduceL{order}", x, attrs={"axes": [axis], "keepdims": 1})
    # As in PyTorch, a vector of zeros stays one; 0 / 0 would be NaN.
    length = g.emit("Where", g.emit("Equal", size, g.scalar(0)), g.scalar(1), size)
    y = g.emit("Div", x, length)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        along = sum_axes(g, g.emit("Mul", dy, y), [axis])
        direction = y if order == 2 else g.emit("Sign", x)
        tape.add_gradient(name, g.emit("Div", g.emit("Sub", dy, g.emit("Mul", direction, along)), length))

    return pull
