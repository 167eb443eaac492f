"""Softmax and normalisations of each sample over its last axes (layer, RMS and Lp norms).

Statistics are computed from centred values, so that a mean far from zero costs no precision. If a statistic runs over
channels, its element count is computed at run time.
"""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.element_counts import divide_by_size, sum_axes
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import INPUT, OUTPUT, gradient_reads
from fedprune_export.operators.norm_vectors import mask_norm, tie_vectors
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule

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


@mask_rule("LayerNormalization", "RMSNormalization")
def mask_layer_norm(masks: MaskWriter, node: Node) -> bool:
    rank = masks.rank(node.inputs[0])
    first = int(node.attrs.get("axis", -1)) % rank
    # Cut indices must not count in mean and variance, so the norm is written out.
    axes = range(first, rank)
    return mask_norm(masks, node, axes, {a: m for a in axes if (m := masks.mask_of(node.inputs[0], a)) is not None})


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


@gradient_rule("LayerNormalization")
def layer_norm(tape: Tape, node: Node) -> Pull:
    """Normalise over the last axes, and scale and shift each element.

    If channels are among the axes, the number of elements is computed at run time.
    """
    name, gamma, beta = node.inputs[0], node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else ""
    if any(node.outputs[1:]):
        raise ModelError(f"{describe(node)}: its statistics are used", expected="one output")
    x, shape = tape.value(name), tape.shape(name)
    g, rank = tape.graph, len(shape)
    axis = int(node.attrs.get("axis", -1)) % rank
    axes, epsilon = list(range(axis, rank)), float(node.attrs.get("epsilon", 1e-5))
    scale = tape.fit_to_width(node, 1, shape[axis:])
    dims = [shape[a] for a in axes]
    # The operator's own statistics lose digits where the mean is large; of centred values they are exact.
    centred = g.emit("Sub", x, g.emit("ReduceMean", x, attrs={"axes": axes, "keepdims": 1}))
    inputs = [centred, scale] + ([tape.fit_to_width(node, 2, shape[axis:])] if beta else [])
    y, rest, inverse = g.emit_many("LayerNormalization", *inputs, outputs=3, attrs={"axis": axis, "epsilon": epsilon})
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        z = g.emit("Mul", g.emit("Sub", centred, rest), inverse)
        if tape.needs_gradient(gamma):
            tape.add_gradient(gamma, tape.sum_to_shape(g.emit("Mul", dy, z), shape, tape.shape(gamma)))
        if beta and tape.needs_gradient(beta):
            tape.add_gradient(beta, tape.sum_to_shape(dy, shape, tape.shape(beta)))
        if tape.needs_gradient(name):
            dz = g.emit("Mul", dy, scale)
            share = divide_by_size(tape, sum_axes(g, dz, axes), dims)
            slope = divide_by_size(tape, sum_axes(g, g.emit("Mul", dz, z), axes), dims)
            change = g.emit("Sub", g.emit("Sub", dz, share), g.emit("Mul", z, slope))
            tape.add_gradient(name, g.emit("Mul", change, inverse))

    return pull


@gradient_rule("RMSNormalization")
def rms_norm(tape: Tape, node: Node) -> Pull:
    """Divided by the root of the mean square over the last axes; dx = s · (dz − z · Σ(dz · z)/n)."""
    name, gamma = node.inputs[:2]
    x, shape = tape.value(name), tape.shape(name)
    g, rank = tape.graph, len(shape)
    axes = list(range(int(node.attrs.get("axis", -1)) % rank, rank))
    dims = [shape[a] for a in axes]
    scale = tape.fit_to_width(node, 1, tuple(dims))
    square = g.emit("ReduceMean", g.emit("Mul", x, x), attrs={"axes": axes, "keepdims": 1})
    lifted = g.emit("Add", square, g.scalar(float(node.attrs.get("epsilon", 1e-5))))
    inverse = g.emit("Reciprocal", g.emit("Sqrt", lifted))
    z = g.emit("Mul", x, inverse)
    tape.enter(node.outputs[0], g.emit("Mul", z, scale), shape)

    def pull(dy: str) -> None:
        if tape.needs_gradient(gamma):
            tape.add_gradient(gamma, tape.sum_to_shape(g.emit("Mul", dy, z), shape, tape.shape(gamma)))
        if tape.needs_gradient(name):
            dz = g.emit("Mul", dy, scale)
            slope = divide_by_size(tape, sum_axes(g, g.emit("Mul", dz, z), axes), dims)
            tape.add_gradient(name, g.emit("Mul", g.emit("Sub", dz, g.emit("Mul", z, slope)), inverse))

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
