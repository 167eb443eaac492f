"""Writes Fourier transforms and folds of a fixed size as products and convolutions with constants.

In that form they can be cut and differentiated.
"""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.importing.constants import constant_input
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace

_MAX_MATRIX_ELEMENTS = 2**24  # numbers of a matrix, 64 MiB


def emit_dft(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a DFT [..., n, ..., 1 or 2] along an axis as a product with its matrix.

    Raises `ModelError` if a length or the axis is computed, or the matrix would be too large.
    """
    x, shape = node.inputs[0], trace.shapes[node.inputs[0]]
    length = _constant_number(graph, node, 1, "lengths")
    # The axis is an attribute until opset 19, then an input.
    axis_input = _constant_number(graph, node, 2, "axes") if graph.opset >= 20 else int(node.attrs.get("axis", 1))
    axis = (-2 if axis_input is None else axis_input) % len(shape)
    before = trace.dims(x)[axis]
    if before is None:
        raise ModelError(f"operator DFT ({node.name}) transforms the batch", expected="another axis")
    inverse, onesided = bool(node.attrs.get("inverse")), bool(node.attrs.get("onesided"))
    if length is None:
        length = 2 * (before - 1) if inverse and onesided else before
    parts = trace.shapes[node.outputs[0]][-1]
    matrix = _dft_matrix(node, before, length, shape[-1], inverse=inverse, onesided=onesided, parts=parts)
    # The product works on rows: the transformed axis goes next to the parts and is flattened with them.
    last = len(shape) - 2
    order = [*(i for i in range(last + 1) if i != axis), axis, last + 1]
    transposed = x if axis == last else graph.emit("Transpose", x, attrs={"perm": order})
    lead = [0] * last
    flat = graph.emit("Reshape", transposed, graph.ints(*lead, before * shape[-1]))
    product = graph.emit("MatMul", flat, graph.constant(matrix.reshape(before * shape[-1], -1), np.float32))
    target = graph.ints(*lead, *matrix.shape[2:])
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
    components = rest[0] if rest else 1
    step = _constant_number(graph, node, 1, "steps")
    window = constant_input(graph, node, 2, "windows")
    length = _constant_number(graph, node, 3, "frame lengths")
    length = length if length is not None else window.size if window is not None else samples
    if step is None:
        raise ModelError(f"operator STFT ({node.name}) has no step", expected="a constant one")
    waves = _dft_matrix(node, length, length, components, inverse=False, onesided=bool(node.attrs.get("onesided", 1)))
    if window is not None:
        waves = waves * window.reshape(-1, 1, 1, 1)
    # [time, part, frequency, its part] as kernels [frequency and its part, part, time].
    kernel = waves.transpose(2, 3, 1, 0).reshape(-1, components, length)
    if rest:
        signal = graph.emit("Transpose", x, attrs={"perm": [0, 2, 1]})
    else:
        signal = graph.emit("Unsqueeze", x, graph.ints(1))
    spectrum = graph.emit("Conv", signal, graph.constant(kernel, np.float32), attrs={"strides": [step]})
    rows = graph.emit("Transpose", spectrum, attrs={"perm": [0, 2, 1]})
    graph.emit("Reshape", rows, graph.ints(0, 0, *waves.shape[2:]), out=node.outputs[0])


def _dft_matrix(
    node: Node, samples: int, length: int, components: int, *, inverse: bool, onesided: bool, parts: int = 2
) -> Array:
    """The factors from each part of each sample to each part of each frequency [samples, components, frequencies,
    parts]: the transforms of impulses. Samples beyond `length` have factors of 0.

    Raises `ModelError` if the matrix would be too large, or a one-sided inverse has too many or few frequencies.
    """
    if samples * length * components * parts > _MAX_MATRIX_ELEMENTS:
        raise ModelError(
            f"operator {node.op} ({node.name}): a matrix of {samples} samples and {length} frequencies",
            expected=f"at most {_MAX_MATRIX_ELEMENTS} numbers",
        )
    if inverse and onesided and (samples != length // 2 + 1 or not length):
        what = f"operator DFT ({node.name}) goes back to {length} samples"
        raise ModelError(what, expected=f"{length // 2 + 1} frequencies", got=samples)
    impulses = np.stack([np.eye(samples), 1j * np.eye(samples)], 1)[:, :components]
    if inverse:
        waves = np.fft.irfft(impulses, length) if onesided else np.fft.ifft(impulses, length)
    else:
        waves = np.fft.fft(impulses, length)[..., : length // 2 + 1 if onesided else length]
    return np.stack([waves.real, waves.imag], -1)[..., :parts]


def _constant_number(graph: Graph, node: Node, index: int, what: str) -> int | None:
    value = constant_input(graph, node, index, what)
    return None if value is None else int(value.reshape(-1)[0])


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
    channels = trace.shapes[node.inputs[0]][1] // size
    kernel = np.eye(size, dtype=np.float32).reshape(size, 1, *block)
    maps = graph.emit("Reshape", node.inputs[0], graph.ints(-1, size, *counts))
    # What no block reaches at the end of the image is 0.
    attrs = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": output_padding}
    sums = graph.emit("ConvTranspose", maps, graph.constant(kernel, np.float32), attrs=attrs)
    graph.emit("Reshape", sums, graph.ints(-1, channels, *image), out=node.outputs[0])
