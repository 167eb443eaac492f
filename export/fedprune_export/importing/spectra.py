"""Writes Fourier transforms and folds of a fixed size as products and convolutions with constants.

In that form they can be cut and differentiated. The constants of a transform are measured by a run on unit vectors.
"""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.importing.constants import constant_input
from fedprune_export.ir.axis_matrix import run_operator
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace

_MAX_MATRIX_ELEMENTS = 2**24  # numbers of a matrix, 64 MiB


def emit_dft(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a DFT [..., n, ..., 1 or 2] along an axis as a product with its matrix.

    Raises `ModelError` if a length or the axis is computed, or the matrix would be too large.
    """
    x, shape = node.inputs[0], trace.shapes[node.inputs[0]]
    # The axis is an attribute until opset 19, then an input.
    axes = constant_input(graph, node, 2, "axes") if graph.opset >= 20 else np.array(node.attrs.get("axis", 1))
    axis = (-2 if axes is None else int(axes.item())) % len(shape)
    if trace.batched(x)[axis]:
        raise ModelError(f"operator DFT ({node.name}) transforms the batch", expected="another axis")
    before, after = shape[axis], trace.shapes[node.outputs[0]][axis]
    arguments = [constant_input(graph, node, 1, "lengths")]
    if graph.opset >= 20:
        arguments.append(np.array(1))
    attrs = {**node.attrs, "axis": 1} if graph.opset < 20 else node.attrs
    waves = _waves(graph, Node("DFT", [], [], attrs, node.name), arguments, before, after, shape[-1])
    # The product works on rows: the transformed axis goes next to the parts and is flattened with them.
    last = len(shape) - 2
    order = [*(i for i in range(last + 1) if i != axis), axis, last + 1]
    transposed = x if axis == last else graph.emit("Transpose", x, attrs={"perm": order})
    lead = [0] * last
    flat = graph.emit("Reshape", transposed, graph.ints(*lead, before * shape[-1]))
    product = graph.emit("MatMul", flat, graph.constant(waves.reshape(len(waves), -1), np.float32))
    target = graph.ints(*lead, *waves.shape[1:])
    if axis == last:
        graph.emit("Reshape", product, target, out=node.outputs[0])
    else:
        back = np.argsort(order).tolist()
        graph.emit("Transpose", graph.emit("Reshape", product, target), attrs={"perm": back}, out=node.outputs[0])


def emit_stft(graph: Graph, node: Node, trace: Trace) -> None:
    """Write an STFT of signals [batch, n, 1 or 2] as a convolution with the windowed waves of its frequencies.

    Real signals may also be [batch, n], as onnxruntime takes them and torch's older exporter writes them.

    Raises `ModelError` if the window, the step or the length of a frame is computed.
    """
    x, (_, samples, *rest) = node.inputs[0], trace.shapes[node.inputs[0]]
    step, window = constant_input(graph, node, 1, "steps"), constant_input(graph, node, 2, "windows")
    lengths = constant_input(graph, node, 3, "frame lengths")
    length = int(lengths.item()) if lengths is not None else window.size if window is not None else samples
    if step is None:
        raise ModelError(f"operator STFT ({node.name}) has no step", expected="a constant one")
    frequencies = trace.shapes[node.outputs[0]][2]
    waves = _waves(graph, node, [step, window, np.array(length)], length, frequencies, *(rest or [1]))
    # [time and its part, one frame, frequency, its part] as kernels [frequency and its part, part, time].
    kernel = waves.reshape(length, -1, 2 * frequencies).transpose(2, 1, 0)
    if rest:
        signal = graph.emit("Transpose", x, attrs={"perm": [0, 2, 1]})
    else:
        signal = graph.emit("Unsqueeze", x, graph.ints(1))
    spectrum = graph.emit("Conv", signal, graph.constant(kernel, np.float32), attrs={"strides": [int(step.item())]})
    rows = graph.emit("Transpose", spectrum, attrs={"perm": [0, 2, 1]})
    graph.emit("Reshape", rows, graph.ints(0, 0, frequencies, 2), out=node.outputs[0])


def _waves(
    graph: Graph, node: Node, arguments: list[Array | None], samples: int, frequencies: int, components: int
) -> Array:
    """The transforms of impulses [samples * components, ...], one in each part of each sample.

    Raises `ModelError` if they would be too large.
    """
    impulses = samples * components
    if impulses * max(impulses, 2 * frequencies) > _MAX_MATRIX_ELEMENTS:
        raise ModelError(
            f"operator {node.op} ({node.name}): a matrix of {samples} samples and {frequencies} frequencies",
            expected=f"at most {_MAX_MATRIX_ELEMENTS} numbers",
        )
    units = np.eye(impulses, dtype=np.float32).reshape(impulses, samples, components)
    return run_operator(node.op, units, arguments, node.attrs, graph.opset)


def emit_fold(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a Col2Im [batch, channels * block, blocks] as a transposed convolution.

    Its kernel puts each element of a block at its position, and overlapping elements are summed. Raises `ModelError` if
    the shape of the image or of a block is computed.
    """
    shapes = (constant_input(graph, node, i, "shapes") for i in (1, 2))
    image, block = ([] if sizes is None else [int(n) for n in sizes.reshape(-1)] for sizes in shapes)
    rank, ones = len(image), [1] * len(image)
    strides, dilations = (list(node.attrs.get(n, ones)) for n in ("strides", "dilations"))
    pads = list(node.attrs.get("pads", [0] * 2 * rank))
    spans = [d * (b - 1) + 1 for d, b in zip(dilations, block, strict=True)]
    padded = [n + pads[i] + pads[rank + i] for i, n in enumerate(image)]
    counts = [(w - span) // s + 1 for w, span, s in zip(padded, spans, strides, strict=True)]
    output_padding = [w - (n - 1) * s - span for w, n, s, span in zip(padded, counts, strides, spans, strict=True)]
    size = math.prod(block)
    if size**2 > _MAX_MATRIX_ELEMENTS:
        raise ModelError(f"operator {node.op} ({node.name}): a block of {size} numbers", expected="at most 4096")
    channels = trace.shapes[node.inputs[0]][1] // size
    kernel = np.eye(size, dtype=np.float32).reshape(size, 1, *block)
    maps = graph.emit("Reshape", node.inputs[0], graph.ints(-1, size, *counts))
    # What no block reaches at the end of the image is 0.
    attrs = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": output_padding}
    sums = graph.emit("ConvTranspose", maps, graph.constant(kernel, np.float32), attrs=attrs)
    graph.emit("Reshape", sums, graph.ints(-1, channels, *image), out=node.outputs[0])
