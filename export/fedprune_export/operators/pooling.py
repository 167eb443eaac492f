"""Pooling by the maximum or the average, over windows or whole maps."""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.planning.probe_report import CPU
from fedprune_export.autodiff.sliding_window import Window, window
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import BOTH, INPUT, gradient_reads
from fedprune_export.operators.elementwise import where_positive, where_true

gradient_reads(INPUT, "GlobalMaxPool")
gradient_reads(BOTH, "MaxPool")


@channel_rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
def pooling_channels(channels: Channels, node: Node) -> None:
    """Channels pass and spatial axes stay. If indices of maxima are an output, channels stay: these count them."""
    x = channels.input_rows(node, 0)
    pools_channels = any(row.any() for row in x[2:])
    if pools_channels or (len(node.outputs) > 1 and node.outputs[1]):
        channels.fix(x)
        channels.fix_outputs(node)
        return
    shape = channels.shape(node.outputs[0])
    channels.set_output(node, [x[0], x[1], *(fixed_row(n) for n in shape[2:])])


def _kernel(node: Node) -> tuple[int, ...]:
    return tuple(int(k) for k in node.attrs["kernel_shape"])


def _upsample(g: Graph, value: str, factors: tuple[int, ...]) -> str:
    """Repeat every element to a block."""
    attrs = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    scales = g.constant([1.0, 1.0, *map(float, factors)], np.float32)
    return g.emit("Resize", value, "", scales, attrs=attrs)


@gradient_rule("MaxPool")
def max_pool(tape: Tape, node: Node) -> Pull:
    """The gradient goes to the first maximum of each window, as in PyTorch, also where several are equal."""
    if len(node.outputs) > 1 and node.outputs[1]:
        raise ModelError(f"{describe(node)}: the indices of a pooling are used")
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    w = window(tape, node, _kernel(node))
    g = tape.graph
    attrs = w.attrs
    out: Shape = (*shape[:2], *w.output)
    if not tape.needs_gradient(name):
        tape.enter(node.outputs[0], g.emit("MaxPool", x, attrs=attrs), out)
        return lambda dy: None
    # Windows side by side on at most two axes: a Resize repeats each result over its window.
    if w.is_tiling and len(w.sizes) < 3:
        y = g.emit("MaxPool", x, attrs=attrs)
        tape.enter(node.outputs[0], y, out)
        before = tape.producer(name)
        follows = before is not None and before.op == "Relu" and tape.only_reader(name) is node

        def pull_tiled(dy: str) -> None:
            target = name
            if before is not None and follows:
                # What comes out of a ReLU is 0 exactly where its maximum is: the small array is masked.
                target, dy = before.inputs[0], where_positive(tape, dy, y)
            tape.add_gradient(target, tiled_gradient(tape, w, x, y, dy))

        return pull_tiled
    y, indices = g.emit_many("MaxPool", x, outputs=2, attrs=attrs)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        # Indices are flat over the whole input, so one scatter serves all of it; windows that overlap add up.
        flat = g.emit("Reshape", x, g.ints(-1))
        zeros = g.emit("ConstantOfShape", tape.shape_of(flat))
        flat_indices, gradients = g.emit("Reshape", indices, g.ints(-1)), g.emit("Reshape", dy, g.ints(-1))
        spread = g.emit("ScatterElements", zeros, flat_indices, gradients, attrs={"axis": 0, "reduction": "add"})
        tape.add_gradient(name, g.emit("Reshape", spread, tape.shape_of(x)))

    return pull


# Float32 has every whole number up to this one.
_MAX_EXACT_MARK = 2**24


def tiled_gradient(tape: Tape, w: Window, x: str, y: str, dy: str) -> str:
    """The gradient of windows side by side, without the slow indices of MaxPool.

    Candidates (equal to their window's maximum) get distinct marks, highest for the first; the highest mark in each
    window wins. Exact, and much faster than pooling with indices.
    """
    g = tape.graph
    area = math.prod(w.sizes)
    unpools = g.unit == CPU and area <= _MAX_EXACT_MARK  # CUDA has no kernel of MaxUnpool
    # Of a node's inputs onnxruntime computes the one that was written last first: this one only once marks are gone.
    spread = "" if unpools else _upsample(g, dy, w.kernel)
    # Marks that are indices count down over the whole map, others over each window.
    if unpools:
        marks = np.arange(area)[::-1].reshape(w.sizes)
    else:
        marks = np.tile(np.arange(math.prod(w.kernel), 0, -1).reshape(w.kernel), w.output)
    # Products, because onnxruntime's Where makes two further arrays of its output's size.
    candidate = g.emit("Cast", g.emit("Equal", x, _upsample(g, y, w.kernel)), attrs={"to": 1})
    mark = g.emit("Mul", candidate, g.constant(marks[None, None], np.float32))
    attrs = {"kernel_shape": list(w.kernel), "strides": list(w.strides)}
    best = g.emit("MaxPool", mark, attrs=attrs)
    if unpools:
        return g.emit("MaxUnpool", dy, _flat_indices(g, best, area, len(w.sizes)), attrs=attrs)
    return where_true(tape, g.emit("Equal", mark, _upsample(g, best, w.kernel)), spread)


def _flat_indices(g: Graph, marks: str, area: int, rank: int) -> str:
    """Where in the whole input [N, C, ...] the elements are that have these marks: 0 on the last one of a map.

    MaxUnpool writes wherever an index points, so none may lie outside: a window of NaN has no candidate, and mark 0.
    """
    shape = g.emit("Shape", marks, attrs={"end": 2})
    first, step = g.constant(area - 1, np.int64), g.constant(area, np.int64)
    elements = g.emit("Mul", g.emit("ReduceProd", shape, attrs={"keepdims": 0}), step)
    last = g.emit("Range", first, elements, step)
    last = g.emit("Reshape", last, g.emit("Concat", shape, g.ints(*[1] * rank), attrs={"axis": 0}))
    return g.emit("Sub", last, g.emit("Cast", marks, attrs={"to": 7}))


@gradient_rule("GlobalMaxPool")
def global_max_pool(tape: Tape, node: Node) -> Pull:
    """The gradient goes to the first maximum of each map, as torch does it."""
    name, g = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    area = math.prod(tape.static(node, shape[2:]))
    tape.enter(node.outputs[0], g.emit("GlobalMaxPool", x), (*shape[:2], *[1] * (len(shape) - 2)))

    def pull(dy: str) -> None:
        flat = g.emit("Reshape", x, g.ints(0, 0, -1))
        # ArgMax takes the first of equal numbers.
        index = g.emit("ArgMax", flat, attrs={"axis": 2, "keepdims": 1})
        is_maximum = g.emit("Equal", index, g.constant(np.arange(area)[None, None], np.int64))
        spread = g.emit("Where", is_maximum, g.emit("Reshape", dy, g.ints(0, 0, 1)), g.scalar(0))
        tape.add_gradient(name, g.emit("Reshape", spread, tape.shape_of(x)))

    return pull


@gradient_rule("AveragePool")
def average_pool(tape: Tape, node: Node) -> Pull:
    """The gradient is spread evenly over each window (over what is not padding, if padding doesn't count).

    Of a window that reaches beyond its padding (a size that is rounded up) what is beyond never counts, as in torch.
    """
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    w = window(tape, node, _kernel(node))
    if any(d != 1 for d in w.dilations):
        raise ModelError(f"{describe(node)}: dilation of an average", hint="Use a convolution.")
    counted = bool(node.attrs.get("count_include_pad", 0))
    g, counts = tape.graph, _window_counts(w, counted)
    beyond = any(w.overhang)
    attrs = {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "pads": w.flat_pads,
        "count_include_pad": int(counted or beyond),
    }
    y = g.emit("AveragePool", x, attrs=attrs)
    # onnxruntime divides by the whole window, PyTorch by what lies within the map and its padding.
    if beyond:
        y = g.emit("Mul", y, g.constant(math.prod(w.kernel) / counts[None, None], np.float32))
    tape.enter(node.outputs[0], y, (*shape[:2], *w.output))

    def pull(dy: str) -> None:
        share = g.emit("Mul", dy, g.constant(1 / counts[None, None], np.float32))
        tape.add_gradient(name, _spread(tape, w, x, share))

    return pull


def _spread(tape: Tape, w: Window, x: str, share: str) -> str:
    """For every position of x the sum over the windows that contain it."""
    g = tape.graph
    if w.is_tiling and len(w.sizes) < 3:
        return _upsample(g, share, w.kernel)
    # Channels join the batch: one kernel of ones then serves any number of them.
    rows = g.emit("Reshape", share, g.ints(-1, 1, *w.output))
    ones = g.constant(np.ones((1, 1, *w.kernel)), np.float32)
    spread = g.emit("ConvTranspose", rows, ones, attrs=w.transposed_attrs())
    return g.emit("Reshape", spread, tape.shape_of(x))


def _window_counts(w: Window, counted: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    total = np.ones(w.output)
    for axis, (size, k, stride, pad, out) in enumerate(
        zip(w.sizes, w.kernel, w.strides, w.pads, w.output, strict=True)
    ):
        start = np.arange(out) * stride - pad[0]
        end = size + pad[1] - w.overhang[axis]
        per_axis = np.minimum(start + k, end) - start if counted else np.minimum(start + k, size) - np.maximum(start, 0)
        total = total * per_axis.reshape([-1 if i == axis else 1 for i in range(len(w.output))])
    return total
