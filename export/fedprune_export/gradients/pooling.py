"""Gradient rules of max and average pooling."""

from __future__ import annotations

import math

import numpy as np

from fedprune.errors import ModelError
from fedprune_export.gradients.tape import Pull, Shape, Tape, describe, rule
from fedprune_export.gradients.windows import Window, leftovers, window
from fedprune_export.graph import Graph, Node


def _kernel(node: Node) -> tuple[int, ...]:
    return tuple(int(k) for k in node.attrs["kernel_shape"])


def _upsampled(g: Graph, value: str, factors: tuple[int, ...]) -> str:
    """Every element repeated to a block."""
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    scales = g.constant([1.0, 1.0, *map(float, factors)], np.float32)
    return g.emit("Resize", value, "", scales, attrs=attrs)


@rule("MaxPool")
def max_pool(tape: Tape, node: Node) -> Pull:
    """The gradient goes to the first maximum of each window, as torch does it, in flat regions, too."""
    if len(node.outputs) > 1 and node.outputs[1]:
        raise ModelError(f"{describe(node)}: the indices of a pooling are used")
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    w = window(tape, node, _kernel(node))
    g = tape.graph
    attrs = {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "pads": w.flat_pads,
        "dilations": list(w.dilations),
    }
    out: Shape = (*shape[:2], *w.output)
    if not tape.wants(name):
        tape.enter(node.outputs[0], g.emit("MaxPool", x, attrs=attrs), out)
        return lambda dy: None
    if w.tiles and len(w.sizes) == 2:
        y = g.emit("MaxPool", x, attrs=attrs)
        tape.enter(node.outputs[0], y, out)
        before = tape.producer(name)
        rectified = before is not None and before.op == "Relu" and tape.only_reader(name) is node

        def pull_tiled(dy: str) -> None:
            if before is None or not rectified:
                tape.add(name, _tiled_gradient(g, w, x, y, dy))
                return
            # What comes out of a ReLU is 0 exactly where its maximum is: the small array is masked, not the large one.
            masked = g.emit("Where", g.emit("Greater", y, g.scalar(0)), dy, g.scalar(0))
            tape.add(before.inputs[0], _tiled_gradient(g, w, x, y, masked))

        return pull_tiled
    y, indices = g.emit_many("MaxPool", x, outputs=2, attrs=attrs)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        # Indices are flat over the whole input, so one scatter serves all of it; windows that overlap add up.
        flat = g.emit("Reshape", x, g.ints(-1))
        zeros = g.emit("ConstantOfShape", tape.shape_of(flat))
        places, parts = g.emit("Reshape", indices, g.ints(-1)), g.emit("Reshape", dy, g.ints(-1))
        spread = g.emit("ScatterElements", zeros, places, parts, attrs={"axis": 0, "reduction": "add"})
        tape.add(name, g.emit("Reshape", spread, tape.shape_of(x)))

    return pull


def _tiled_gradient(g: Graph, w: Window, x: str, y: str, dy: str) -> str:
    """The gradient where windows lie side by side, without the slow indices.

    Candidates (equal to their window's maximum) get distinct marks, highest for the first; the highest mark in each
    window wins. Exact, and much faster than pooling with indices.
    """
    marks = np.arange(math.prod(w.kernel), 0, -1, dtype=np.float32).reshape(w.kernel)
    tiled = np.tile(marks, w.output)[None, None]
    candidate = g.emit("Equal", x, _upsampled(g, y, w.kernel))
    mark = g.emit("Where", candidate, g.constant(tiled, np.float32), g.scalar(0))
    attrs = {"kernel_shape": list(w.kernel), "strides": list(w.strides)}
    best = _upsampled(g, g.emit("MaxPool", mark, attrs=attrs), w.kernel)
    return g.emit("Where", g.emit("Equal", mark, best), _upsampled(g, dy, w.kernel), g.scalar(0))


@rule("AveragePool")
def average_pool(tape: Tape, node: Node) -> Pull:
    """The gradient is spread evenly over each window (over what is not padding, if padding doesn't count)."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    w = window(tape, node, _kernel(node))
    if any(d != 1 for d in w.dilations) or (
        int(node.attrs.get("ceil_mode", 0)) and w.flat_pads != list(node.attrs.get("pads", [0] * len(w.flat_pads)))
    ):
        raise ModelError(f"{describe(node)}: dilation or a rounded-up size", hint="Use a window that fits the map.")
    counted = bool(node.attrs.get("count_include_pad", 0))
    g = tape.graph
    attrs = {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "pads": w.flat_pads,
        "count_include_pad": int(counted),
    }
    tape.enter(node.outputs[0], g.emit("AveragePool", x, attrs=attrs), (*shape[:2], *w.output))

    def pull(dy: str) -> None:
        share = g.emit("Mul", dy, g.constant(1 / _counts(w, counted)[None, None], np.float32))
        if w.tiles and len(w.sizes) == 2:
            tape.add(name, _upsampled(g, share, w.kernel))
            return
        # Channels join the batch: one kernel of ones then serves any number of them.
        rows = g.emit("Reshape", share, g.ints(-1, 1, *w.output))
        spread = g.emit(
            "ConvTranspose",
            rows,
            g.constant(np.ones((1, 1, *w.kernel)), np.float32),
            attrs={
                "kernel_shape": list(w.kernel),
                "strides": list(w.strides),
                "pads": w.flat_pads,
                "output_padding": leftovers(w),
            },
        )
        tape.add(name, g.emit("Reshape", spread, tape.shape_of(x)))

    return pull


def _counts(w: Window, counted: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """How many elements each window averages."""
    total = np.ones(w.output)
    for axis, (size, k, stride, pad, out) in enumerate(
        zip(w.sizes, w.kernel, w.strides, w.pads, w.output, strict=True)
    ):
        start = np.arange(out) * stride - pad[0]
        inside = np.minimum(start + k, size) - np.maximum(start, 0)
        per_axis = np.full(out, k) if counted else inside
        total = total * per_axis.reshape([-1 if i == axis else 1 for i in range(len(w.output))])
    return total
